"""A text tower and its backward pass: how much each token contributes to the cosine of a text and a picture.

    contribution of token t = sum over layers, heads and queries q of p[q, t] d cosine / d p[q, t]

with p the probabilities of attention, in the last layers. The product keeps its sign: there is no ReLU. It is the
derivative of the cosine by a factor g_t, 1 for all t, of the values v_t of all heads of these layers, because attention
is sum_t p[q, t] v_t. So it is exact for a text tower that is linear in its values: such a token contributes what the
cosine loses without it. A token that no query reads, such as padding, contributes 0.

Source: gradient x attention: Chefer et al. 2021 (arXiv 2103.15679), equation 5, which drops negative products; CLIP4DM,
Nam et al. 2024 (arXiv 2412.18404), which keeps them, and takes the last layers of the text tower. Here contributions
are added up over layers, without the product of matrices of Chefer's equation 6.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from calmclip.export.towers.mixer import Mixer
from calmclip.export.towers.modules import Module
from calmclip.export.towers.prefix import Prefixed


class Attribution(Module):
    """ids int64 [B, T], perhaps a mask int64 [B, T], image_embeds float32 [B, D], unit rows -> contributions float32
    [B, T], score float32 [B], the cosine.

    ``text``: a tower of unit vectors. Its modules with an attribute ``gain`` attend; the last ``layers`` of them count.
    """

    def __init__(self, text: nn.Module, layers: int) -> None:
        super().__init__()
        self.text, self.layers = text, layers

    def forward(self, *inputs: Tensor) -> Any:
        with torch.inference_mode(False):
            return self.differentiated(*(tensor.clone() if tensor.is_inference() else tensor for tensor in inputs))

    def differentiated(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, image = inputs
        watched = attending(self.text)[-self.layers :]
        gain = torch.ones(tokens[0].shape, dtype=image.dtype, device=image.device)[..., None].requires_grad_()
        try:
            with torch.enable_grad():
                for module in watched:
                    module.gain = gain
                score = (self.text(*tokens) * image).sum(dim=-1)
                (contributions,) = torch.autograd.grad(score.sum(), gain)
        finally:
            for module in watched:
                module.gain = None
        return contributions[..., 0], score.detach()

    def flattened(self, inputs: Sequence[Tensor]) -> nn.Module:
        """The same as one graph of operators, with the backward pass among them, because torch's exporter does not run
        autograd. Its parameters are those of this module, under their names. ``inputs``: any; sizes stay free."""
        # the recorder counts `self` among the arguments of a bound method
        run = lambda *tensors: self.differentiated(*tensors)  # noqa: E731, PLW0108
        graph = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
        return _named(_plain(graph), self)


def attending(text: nn.Module) -> list[Any]:
    """The modules of attention, in the order of the layers."""
    return [module for module in text.modules() if hasattr(module, "gain")]


def why_not(text: nn.Module) -> str:
    """Why contributions of tokens do not explain such a tower; "" if they do."""
    if isinstance(text, Prefixed):
        return "learnt rows stand in its texts, which have no words"
    modules = [*text.modules()]
    if any(isinstance(module, Mixer) for module in modules):
        return "convolutions of its text tower mix neighbouring tokens beside attention"
    if not attending(text):
        return f"no attention mixes the tokens of its text tower ({type(text).__name__})"
    return ""


def _named(graph: fx.GraphModule, module: nn.Module) -> fx.GraphModule:
    """``graph`` with the constants of ``module`` under their names there, and its own under theirs."""
    for name, child in module.named_children():
        graph.add_submodule(name, child)
    names = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and (known := names.get(id(getattr(graph, str(node.target))))):
            node.target = known
    graph.recompile()
    return graph


def _plain(graph: fx.GraphModule) -> fx.GraphModule:
    """``graph`` with the mean and the deviation of a LayerNorm that its backward pass reads computed apart: not every
    engine gives the second and third output of ONNX's LayerNormalization."""
    aten = torch.ops.aten
    for node in [node for node in graph.graph.nodes if node.target is aten.native_layer_norm.default]:
        saved = {user.args[1]: user for user in node.users if user.args[1] in (1, 2) and user.users}
        if not saved:
            continue
        x, epsilon = node.args[0], node.args[4]
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            mean = call(aten.mean.dim, (x, [-1], True))
            centred = call(aten.sub.Tensor, (x, mean))
            variance = call(aten.mean.dim, (call(aten.mul.Tensor, (centred, centred)), [-1], True))
            deviation = call(aten.rsqrt.default, (call(aten.add.Tensor, (variance, epsilon)),))
        for place, user in saved.items():
            user.replace_all_uses_with((mean, deviation)[place - 1])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


Flattened = Callable[[Sequence[Tensor]], nn.Module]


def flattened(module: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """``module``, or what it gives in its place to be traced."""
    flatten = getattr(module, "flattened", None)
    return cast(Flattened, flatten)(inputs) if flatten else module

"""`calmclip train`: a small training loop for nets that are to be quantized, from scratch or from a checkpoint.

settings.py     what is asked for: a net's size, its attention, an objective, how long
data.py         rows of tokens, pictures of classes, pictures with captions
start.py        the net to be trained: new, or a checkpoint's with the attention that is asked for
objectives.py   what is learned: mlm, clm, classes, contrastive
loop.py         steps, a log, states to go on from
write.py        a Hugging Face directory, in the names that export reads
demonstration.py    vanilla, clipped and gated nets, trained and quantized: the paper's table at a small size
"""

"""What flipped bits do to a bundle, and bounds on activations against them.

Source: Mousavi et al., ProAct (code `hamidmousavi0/reliable-relu-toolbox`): bounded activations, and its faults.
"""

"""The fixed set of tasks: pure flows, no I/O, no threads.

classify   picture + labels -> ranked labels
embed      texts and pictures -> unit vectors
detect     picture + labels -> boxes, through soft-NMS
raw        named tensors -> named tensors of one graph
"""

"""Arithmetic, most of it of linear attention, written down plainly and written to be fast.

    formula.py     phi, the state and its application, by head, in any precision: what is meant
    streamed.py    the whole module in fp32 and fp64, block of tokens by block, by C x C products
    fused.py        the state and its application in half precision and fp32, on GPUs, by Triton
    norms.py        group norms with SiLU, and layer norms, likewise, formulas beside
    pointwise.py    the gate of feed-forwards, and sums, likewise
    convolution.py  convolutions by chunks of rows, and of doubled pictures by phases

Whatever is fast here has a plain counterpart, and a test that holds the two together.
"""

"""The arithmetic of linear attention, written down plainly and written to be fast.

    formula.py     phi, the state and its application, by head, in any precision: what is meant
    streamed.py    the whole module in fp32 and fp64, block of tokens by block, by C x C products
    fused.py        the state and its application in half precision and fp32, on GPUs, by Triton

Whatever is fast here has its counterpart in `formula.py`, and a test that holds the two together.
"""

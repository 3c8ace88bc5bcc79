"""States of every chunk in memory, then all chunks in parallel: heads that share q and k share their products.

store      kernel and launcher of the states before each chunk, or of the gradients of states after each
outputs    the output of every chunk
gradients  every gradient of every chunk in one launch; gates exactly, because both states of a chunk are there
"""

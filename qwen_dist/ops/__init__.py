"""How fast: every operation that has more than one implementation, with its plain form beside its kernels.

`dispatch` says which implementation runs on which backend; `table` has all operations. `models` says what is computed.
"""

import os

# Every call by value on a list of that many tensors fails, as one does that finds no memory.
FAILS_ON = int(os.environ.get("STAND_IN_FAILS_ON", "-1"))


def get_total_norm(tensors, norm_type, foreach):
    return tensors[0]


def clip_grad_norm_(params, max_norm, foreach):
    assert all(param.grad is param.tensor for param in params)


def clip_grad_value_(params, bound, foreach):
    if len(params) == FAILS_ON:
        raise RuntimeError("out of memory\nand more")

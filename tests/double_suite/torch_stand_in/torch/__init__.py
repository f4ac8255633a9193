"""What benches/torch_gpu.py uses of PyTorch, without numbers: shapes, views and calls. tests/double_suite/torch_gpu.rs runs
the script with it."""

__version__ = "stand-in"


class Dtype:
    def __init__(self, itemsize):
        self.itemsize = itemsize


uint8, float16, bfloat16, float32, int64 = Dtype(1), Dtype(2), Dtype(2), Dtype(4), Dtype(8)


class Tensor:
    def __init__(self, numel, dtype=float32):
        self.count, self.dtype = numel, dtype

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        start, stop = part.start or 0, self.count if part.stop is None else part.stop
        return Tensor(max(min(stop, self.count) - start, 0), self.dtype)

    def view(self, dtype):
        size = self.count * self.dtype.itemsize
        assert size % dtype.itemsize == 0
        return Tensor(size // dtype.itemsize, dtype)

    def copy_(self, other):
        assert len(self) == len(other), (len(self), len(other))

    def numel(self):
        return self.count

    def item(self):
        return 1.0

    def same(self, *_):
        return self

    zero_ = mul_ = clamp_ = sum = norm = square = double = clamp = __mul__ = __rmul__ = same


class Generator:
    def __init__(self, device):
        self.device = device

    def manual_seed(self, seed):
        return self


class linalg:
    vector_norm = staticmethod(lambda tensor: tensor)


def zeros(numel, dtype, device):
    return Tensor(numel, dtype)


def randn(numel, generator, device):
    return Tensor(numel)


def stack(tensors):
    return tensors[0]


def set_grad_enabled(enabled):
    pass

class Parameter:
    def __init__(self, tensor, requires_grad):
        self.tensor, self.grad = tensor, None

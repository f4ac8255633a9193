// Least squares, y = x w, by gradient descent: the kernels of the example. x has n rows of d, by row.

// residual = x w - y
extern "C" __global__ void forward(const float* x, const float* y, const float* w, float* residual, int n, int d) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= n) return;
  float sum = -y[row];
  for (int j = 0; j < d; ++j) sum += x[row * d + j] * w[j];
  residual[row] = sum;
}

// grad = x^T residual / n
extern "C" __global__ void backward(const float* x, const float* residual, float* grad, int n, int d) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= d) return;
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i * d + column] * residual[i];
  grad[column] = sum / n;
}

// w -= learning_rate * grad
extern "C" __global__ void step(float* w, const float* grad, float learning_rate, int d) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j < d) w[j] -= learning_rate * grad[j];
}

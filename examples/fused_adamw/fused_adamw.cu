// AdamW that takes the gradient as backward left it, scaled and not clipped, and multiplies it by what gradclip has left
// on the device. No host in between: whether the step is taken, and by which loss scale the next one goes, is decided
// here too.

// residual *= loss_scale: the gradients that follow are those of the scaled loss.
extern "C" __global__ void scale_residual(float* residual, const float* loss_scale, int n) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < n) residual[row] *= *loss_scale;
}

// What a step needs besides the gradient. `train.rs` has the same fields.
struct State {
  float loss_scale;
  float good_steps;   // since the loss scale was changed last
  float beta1_power;  // beta1^t, t counting the steps that were taken
  float beta2_power;
};

// Before the step, by one thread: counts it, or backs off from the loss scale that overflowed.
extern "C" __global__ void begin_step(State* state, const float* found_inf, float beta1, float beta2, int growth_interval) {
  if (blockIdx.x * blockDim.x + threadIdx.x > 0) return;
  if (*found_inf != 0) {
    state->loss_scale *= 0.5f;
    state->good_steps = 0;
    return;
  }
  state->beta1_power *= beta1;
  state->beta2_power *= beta2;
  state->good_steps += 1;
  if (state->good_steps >= growth_interval) {
    state->loss_scale *= 2;
    state->good_steps = 0;
  }
}

// x * multiplier as gradclip computes it in f32 (docs/numerics.md, "The product"), so that the bits are those of clipping
// first: the multiplier in two f32, the first one rounded down.
__device__ inline float product(float x, double multiplier) {
  float hi = static_cast<float>(multiplier);
  if (static_cast<double>(hi) > multiplier) hi *= 0.99999994f;  // 1 - 2^-24: the f32 before it
  const float lo = static_cast<float>(multiplier - static_cast<double>(hi));
  return fmaf(x, hi, x * lo);
}

// One step of AdamW (Loshchilov and Hutter, 2019), or none after an overflow.
extern "C" __global__ void adamw_step(float* w, float* m, float* v, const float* grad, const double* multiplier,
                                      const float* found_inf, const State* state, float learning_rate, float beta1,
                                      float beta2, float weight_decay, int d) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= d || *found_inf != 0) return;
  const float g = product(grad[j], *multiplier);
  m[j] = beta1 * m[j] + (1 - beta1) * g;
  v[j] = beta2 * v[j] + (1 - beta2) * g * g;
  const float mean = m[j] / (1 - state->beta1_power), square = v[j] / (1 - state->beta2_power);
  w[j] -= learning_rate * (mean / (sqrtf(square) + 1e-8f) + weight_decay * w[j]);
}

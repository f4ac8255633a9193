//! The pole on a cart of Barto, Sutton and Anderson (1983), with the numbers that CartPole-v1 of Gym made usual.

use rand::{rngs::SmallRng, Rng};

/// Numbers in a state.
pub const STATE: usize = 4;
pub const ACTIONS: usize = 2;
/// An episode ends here if the pole still stands.
pub const LONGEST: u32 = 500;

const GRAVITY: f32 = 9.8;
const CART_MASS: f32 = 1.0;
const POLE_MASS: f32 = 0.1;
const HALF_POLE: f32 = 0.5;
const FORCE: f32 = 10.0;
const SECONDS: f32 = 0.02;
const FARTHEST: f32 = 2.4;
const STEEPEST: f32 = 12.0 * std::f32::consts::PI / 180.0;

pub struct CartPole {
    /// Position and speed of the cart, angle and angular speed of the pole.
    pub state: [f32; STATE],
    steps: u32,
}

impl CartPole {
    pub fn new(rng: &mut SmallRng) -> Self {
        Self { state: std::array::from_fn(|_| rng.random_range(-0.05..0.05)), steps: 0 }
    }

    /// Pushes the cart to the left (0) or to the right (1). At the end of an episode, its length.
    pub fn step(&mut self, action: i64) -> Option<u32> {
        let [position, speed, angle, turning] = self.state;
        let force = if action == 1 { FORCE } else { -FORCE };
        let (sin, cos) = angle.sin_cos();
        let mass = CART_MASS + POLE_MASS;
        let push = (force + POLE_MASS * HALF_POLE * turning * turning * sin) / mass;
        let turn = (GRAVITY * sin - cos * push) / (HALF_POLE * (4.0 / 3.0 - POLE_MASS * cos * cos / mass));
        let pull = push - POLE_MASS * HALF_POLE * turn * cos / mass;
        self.state =
            [position + SECONDS * speed, speed + SECONDS * pull, angle + SECONDS * turning, turning + SECONDS * turn];
        self.steps += 1;
        let over = self.state[0].abs() > FARTHEST || self.state[2].abs() > STEEPEST || self.steps == LONGEST;
        over.then_some(self.steps)
    }
}

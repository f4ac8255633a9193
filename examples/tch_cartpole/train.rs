//! One training run: rollout, backward, clip, step.

use gradclip::{Deferred, NormReport};
use rand::{rngs::SmallRng, SeedableRng};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{no_grad, Device, Kind, Tensor};

use crate::cartpole::{CartPole, ACTIONS, STATE};
use crate::step_share::{Borders, StepTime, Timeline};

const HIDDEN: i64 = 64;
/// Carts that run at the same time, and steps of each between two updates.
const CARTS: usize = 16;
const ROLLOUT: usize = 16;
const DISCOUNT: f32 = 0.99;
const ENTROPY_BONUS: f64 = 0.01;
/// Updates between two looks at the reports and the times.
const LOOK_EVERY: usize = 16;
const _: () = assert!(LOOK_EVERY <= gradclip::REPORTS_KEPT, "on a GPU, older reports are overwritten");
/// Episodes the score is averaged over, and the average that counts as solved.
const EPISODES: usize = 100;
const SOLVED: f64 = 475.0;

/// What is done to the gradients between `backward` and `step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clipping {
    Off,
    /// Largest norm of all gradients together.
    Norm(f64),
    /// The same by tch's own method, which launches for each tensor and waits for the norm.
    NormByTch(f64),
}

/// What is the same in every run.
pub struct Setup {
    pub updates: usize,
    pub lr: f64,
    pub device: Device,
    /// Where the device's time passes.
    pub timeline: Timeline,
}

/// What a run has left behind.
pub struct Run {
    pub clipping: Clipping,
    pub seed: u64,
    /// Norm of the gradients of each update, before clipping. tch's own method does not say it.
    pub norms: Vec<f64>,
    /// Updates whose gradients were changed.
    pub clipped: usize,
    /// Update after which the last [`EPISODES`] episodes were [`SOLVED`].
    pub solved: Option<usize>,
    /// Mean length of the last [`EPISODES`] episodes.
    pub score: f64,
    /// What each update took: rollout, forward, backward, clip and step.
    pub times: Vec<StepTime>,
}

/// Actor and critic, on two hidden layers that they share.
struct Model {
    device: Device,
    body: nn::Sequential,
    actor: nn::Linear,
    critic: nn::Linear,
}

impl Model {
    fn new(path: &nn::Path) -> Self {
        let layer = |name, inputs, outputs| nn::linear(path / name, inputs, outputs, nn::LinearConfig::default());
        let body = nn::seq()
            .add(layer("hidden_1", STATE as i64, HIDDEN))
            .add_fn(Tensor::tanh)
            .add(layer("hidden_2", HIDDEN, HIDDEN))
            .add_fn(Tensor::tanh);
        Self {
            device: path.device(),
            body,
            actor: layer("actor", HIDDEN, ACTIONS as i64),
            critic: layer("critic", HIDDEN, 1),
        }
    }

    fn states(&self, states: &[f32]) -> Tensor {
        Tensor::from_slice(states).view([-1, STATE as i64]).to_device(self.device)
    }

    /// Logits of the actions, and values, of a batch of states.
    fn forward(&self, states: &Tensor) -> (Tensor, Tensor) {
        let hidden = self.body.forward(states);
        (self.actor.forward(&hidden), self.critic.forward(&hidden).squeeze_dim(-1))
    }
}

/// What the carts went through between two updates, one row for each step.
#[derive(Default)]
struct Rollout {
    states: Vec<f32>,
    actions: Vec<i64>,
    /// Whether the episode ended with this step.
    over: Vec<bool>,
}

impl Rollout {
    /// Discounted rewards from each step on: 1 for every step, and what the critic expects after the last one.
    fn returns(&self, after: &[f32]) -> Vec<f32> {
        let mut returns = vec![0.0; self.over.len()];
        for (cart, &after) in after.iter().enumerate() {
            let mut ahead = after;
            for i in (cart..self.over.len()).step_by(CARTS).rev() {
                ahead = 1.0 + if self.over[i] { 0.0 } else { DISCOUNT * ahead };
                returns[i] = ahead;
            }
        }
        returns
    }
}

/// Trains an advantage actor-critic by plain SGD.
pub fn train(setup: &Setup, clipping: Clipping, seed: u64, progress: impl Fn(f64)) -> anyhow::Result<Run> {
    let &Setup { updates, lr, device, ref timeline } = setup;
    tch::manual_seed(seed as i64);
    let mut rng = SmallRng::seed_from_u64(seed);
    let vars = nn::VarStore::new(device);
    let model = Model::new(&vars.root());
    let mut optimizer = nn::Sgd::default().build(&vars, lr)?;
    let params = vars.trainable_variables();
    let mut carts: Vec<CartPole> = (0..CARTS).map(|_| CartPole::new(&mut rng)).collect();
    let mut lengths: Vec<f64> = Vec::new();
    let mut run = Run { clipping, seed, norms: vec![], clipped: 0, solved: None, score: 0.0, times: vec![] };
    let mut unread = Unread::default();

    for update in 0..updates {
        let start = timeline.mark()?;
        let rollout = roll_out(&model, &mut carts, &mut lengths, &mut rng)?;
        let (_, after) = no_grad(|| model.forward(&model.states(&states_of(&carts))));
        let returns = Tensor::from_slice(&rollout.returns(&Vec::try_from(after)?)).to_device(device);

        let states = model.states(&rollout.states);
        let actions = Tensor::from_slice(&rollout.actions).unsqueeze(-1).to_device(device);
        let (logits, values) = model.forward(&states);
        let advantages = returns - values;
        let log_probs = logits.log_softmax(-1, Kind::Float);
        let entropy = -(&log_probs * log_probs.exp()).sum_dim_intlist(-1, false, Kind::Float).mean(Kind::Float);
        let chosen = log_probs.gather(-1, &actions, false).squeeze_dim(-1);
        let actor_loss = -(chosen * advantages.detach()).mean(Kind::Float);
        let critic_loss = advantages.square().mean(Kind::Float);
        let loss: Tensor = actor_loss + 0.5 * critic_loss - ENTROPY_BONUS * entropy;
        optimizer.zero_grad();
        loss.backward();

        let (backward, clip) = (timeline.mark()?, timeline.mark()?);
        match clipping {
            // An infinite threshold only measures.
            Clipping::Off => unread.reports.push(gradclip::tch::clip_grad_norm(&params, f64::INFINITY)?),
            Clipping::Norm(max_norm) => unread.reports.push(gradclip::tch::clip_grad_norm(&params, max_norm)?),
            Clipping::NormByTch(max_norm) => optimizer.clip_grad_norm(max_norm),
        }
        let clipped = timeline.mark()?;
        optimizer.step();
        unread.borders.push(Borders { start, backward, clip, clipped, end: timeline.mark()? });
        if unread.borders.len() == LOOK_EVERY || update + 1 == updates {
            unread.read_into(&mut run)?;
        }

        run.score = score(&lengths);
        if lengths.len() >= EPISODES && run.score >= SOLVED {
            run.solved = run.solved.or(Some(update + 1));
        }
        progress(run.score);
    }
    Ok(run)
}

/// Of the last updates, what may still lie on the GPU.
#[derive(Default)]
struct Unread {
    reports: Vec<Deferred<NormReport>>,
    borders: Vec<Borders>,
}

impl Unread {
    /// Waits for those updates.
    fn read_into(&mut self, run: &mut Run) -> anyhow::Result<()> {
        for report in self.reports.drain(..) {
            let report = report.wait()?;
            run.norms.push(report.total_norm);
            run.clipped += usize::from(report.written);
        }
        for borders in self.borders.drain(..) {
            run.times.push(borders.times()?);
        }
        Ok(())
    }
}

/// Mean length of the last episodes.
fn score(lengths: &[f64]) -> f64 {
    let last = &lengths[lengths.len().saturating_sub(EPISODES)..];
    last.iter().sum::<f64>() / last.len().max(1) as f64
}

fn states_of(carts: &[CartPole]) -> Vec<f32> {
    carts.iter().flat_map(|cart| cart.state).collect()
}

fn roll_out(
    model: &Model,
    carts: &mut [CartPole],
    lengths: &mut Vec<f64>,
    rng: &mut SmallRng,
) -> anyhow::Result<Rollout> {
    let mut rollout = Rollout::default();
    for _ in 0..ROLLOUT {
        let (logits, _) = no_grad(|| model.forward(&model.states(&states_of(carts))));
        // Weights that are no longer finite have no probabilities to draw from: any action does then.
        let probabilities = logits.softmax(-1, Kind::Float).nan_to_num(0.5, None, None);
        let actions = Vec::<i64>::try_from(probabilities.multinomial(1, true).squeeze_dim(-1))?;
        for (cart, &action) in carts.iter_mut().zip(&actions) {
            rollout.states.extend(cart.state);
            let length = cart.step(action);
            rollout.over.push(length.is_some());
            if let Some(length) = length {
                lengths.push(f64::from(length));
                *cart = CartPole::new(rng);
            }
        }
        rollout.actions.extend(actions);
    }
    Ok(rollout)
}

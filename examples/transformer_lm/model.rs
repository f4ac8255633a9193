//! A decoder-only transformer: blocks of causal self-attention and of a feed-forward layer, each behind a layer norm.
//!
//! Every operation here is one of candle-core, or of candle-nn and made from those, and has a backward pass. Two of
//! candle-nn 0.11.1 that would be expected here have none: `LayerNorm` and `ops::softmax_last_dim` end the gradient
//! without a word.

use candle_core::{Device, Module, Result, Tensor, Var, D};
use candle_nn::{loss, ops, Embedding, Linear};
use rand::{rngs::SmallRng, Rng, SeedableRng};

use crate::data::{Windows, CONTEXT};

const WIDTH: usize = 64;
const HEADS: usize = 4;
const BLOCKS: usize = 2;
/// Standard deviation of the initial weights, as in GPT-2.
const WEIGHT_STD: f64 = 0.02;

pub struct Transformer {
    tokens: Embedding,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    /// The weights of `tokens` once more: the head is tied.
    head: Linear,
    /// 0 where a position may look, minus infinity where it would see what follows.
    mask: Tensor,
    vars: Vec<Var>,
}

struct Block {
    attention_norm: LayerNorm,
    /// Queries, keys and values in one matrix.
    qkv: Linear,
    attention_out: Linear,
    mlp_norm: LayerNorm,
    mlp_in: Linear,
    mlp_out: Linear,
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl Transformer {
    /// Weights are drawn here and not by candle-nn, whose draws on the CPU cannot be seeded.
    pub fn new(alphabet_len: usize, seed: u64, device: &Device) -> Result<Self> {
        let mut weights = Weights { rng: SmallRng::seed_from_u64(seed), device, vars: vec![] };
        let embeddings = weights.normal((alphabet_len, WIDTH), WEIGHT_STD)?;
        let positions = weights.normal((CONTEXT, WIDTH), WEIGHT_STD)?;
        let blocks = (0..BLOCKS).map(|_| Block::new(&mut weights)).collect::<Result<_>>()?;
        let norm = weights.layer_norm()?;
        let mask: Vec<f32> =
            (0..CONTEXT * CONTEXT).map(|i| if i % CONTEXT > i / CONTEXT { f32::NEG_INFINITY } else { 0.0 }).collect();
        Ok(Self {
            head: Linear::new(embeddings.clone(), None),
            tokens: Embedding::new(embeddings, WIDTH),
            positions,
            blocks,
            norm,
            mask: Tensor::from_vec(mask, (CONTEXT, CONTEXT), device)?,
            vars: weights.vars,
        })
    }

    pub fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// For each of `windows x length` tokens, a number for each token that could follow.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let length = tokens.dim(1)?;
        let mask = self.mask.narrow(0, 0, length)?.narrow(1, 0, length)?;
        let mut x = self.tokens.forward(tokens)?.broadcast_add(&self.positions.narrow(0, 0, length)?)?;
        for block in &self.blocks {
            x = block.forward(&x, &mask)?;
        }
        self.head.forward(&self.norm.forward(&x)?)
    }

    /// Mean cross-entropy, in nats for each character.
    pub fn loss(&self, windows: &Windows) -> Result<Tensor> {
        let logits = self.logits(&windows.inputs)?;
        loss::cross_entropy(&logits.flatten_to(1)?, &windows.targets.flatten_all()?)
    }
}

impl Block {
    fn new(weights: &mut Weights) -> Result<Self> {
        // What a block adds to its input starts small: 2 * BLOCKS such additions follow each other.
        let added_std = WEIGHT_STD / (2.0 * BLOCKS as f64).sqrt();
        Ok(Self {
            attention_norm: weights.layer_norm()?,
            qkv: weights.linear(WIDTH, 3 * WIDTH, WEIGHT_STD)?,
            attention_out: weights.linear(WIDTH, WIDTH, added_std)?,
            mlp_norm: weights.layer_norm()?,
            mlp_in: weights.linear(WIDTH, 4 * WIDTH, WEIGHT_STD)?,
            mlp_out: weights.linear(4 * WIDTH, WIDTH, added_std)?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.attention_norm.forward(x)?, mask)?)?;
        let hidden = self.mlp_in.forward(&self.mlp_norm.forward(&x)?)?.relu()?;
        &x + self.mlp_out.forward(&hidden)?
    }

    fn attention(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (windows, length, width) = x.dims3()?;
        let head_width = width / HEADS;
        let qkv = self.qkv.forward(x)?.reshape((windows, length, 3 * HEADS, head_width))?.transpose(1, 2)?;
        let part = |i: usize| qkv.narrow(1, i * HEADS, HEADS)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? * (1.0 / (head_width as f64).sqrt()))?.broadcast_add(mask)?;
        let heads = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        self.attention_out.forward(&heads.transpose(1, 2)?.reshape((windows, length, width))?)
    }
}

impl LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

/// Makes the variables, and keeps them in the order in which they were made.
struct Weights<'a> {
    rng: SmallRng,
    device: &'a Device,
    vars: Vec<Var>,
}

impl Weights<'_> {
    fn keep(&mut self, values: Vec<f32>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
        let var = Var::from_tensor(&Tensor::from_vec(values, shape.into(), self.device)?)?;
        self.vars.push(var.clone());
        Ok(var.as_tensor().clone())
    }

    fn normal(&mut self, (rows, columns): (usize, usize), std: f64) -> Result<Tensor> {
        let values = (0..rows * columns).map(|_| (std * normal(&mut self.rng)) as f32).collect();
        self.keep(values, (rows, columns))
    }

    fn linear(&mut self, inputs: usize, outputs: usize, std: f64) -> Result<Linear> {
        let weight = self.normal((outputs, inputs), std)?;
        Ok(Linear::new(weight, Some(self.keep(vec![0.0; outputs], outputs)?)))
    }

    fn layer_norm(&mut self) -> Result<LayerNorm> {
        Ok(LayerNorm { weight: self.keep(vec![1.0; WIDTH], WIDTH)?, bias: self.keep(vec![0.0; WIDTH], WIDTH)? })
    }
}

/// A sample of the normal distribution (Box and Muller).
fn normal(rng: &mut SmallRng) -> f64 {
    let (u, v) = (rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

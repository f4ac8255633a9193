//! The text, and windows of it as tensors.

use candle_core::{Device, Result, Tensor};
use rand::{rngs::SmallRng, Rng, SeedableRng};

/// Sonnets 1 to 36 of William Shakespeare, first printed 1609, in a modernised spelling; in the public domain.
const TEXT: &str = include_str!("sonnets.txt");
/// Sonnets at the end of the text that are not trained on.
const HELD_OUT: usize = 4;

/// Characters before the one to be predicted, at most.
pub const CONTEXT: usize = 64;

pub struct Corpus {
    /// The characters that occur; a token is an index into these.
    alphabet: Vec<char>,
    train: Tensor,
    held_out: Windows,
}

/// Pieces of text, each with the same text one character on.
pub struct Windows {
    /// Tokens, `windows x CONTEXT`.
    pub inputs: Tensor,
    /// The token that follows each of them.
    pub targets: Tensor,
}

/// Where the windows of every step begin. On the device before the first step, so that no step copies anything there.
pub struct Batches {
    starts: Tensor,
    /// `0..=CONTEXT`, the places in a window.
    places: Tensor,
}

impl Corpus {
    pub fn new(device: &Device) -> Result<Self> {
        let mut alphabet: Vec<char> = TEXT.chars().collect();
        alphabet.sort_unstable();
        alphabet.dedup();
        let tokens = |text: &str| -> Vec<u32> { text.chars().map(|c| token(&alphabet, c)).collect() };

        let (border, _) = TEXT.rmatch_indices("\n\n").nth(HELD_OUT - 1).unwrap_or((TEXT.len() / 2, ""));
        let (train, held_out) = TEXT.split_at(border);
        let (train, held_out) = (tokens(train), tokens(held_out));
        let pieces: Vec<_> = held_out.windows(CONTEXT + 1).step_by(CONTEXT).map(<[u32]>::to_vec).collect();
        Ok(Self {
            train: Tensor::new(train, device)?,
            held_out: Windows::split(&Tensor::new(pieces, device)?)?,
            alphabet,
        })
    }

    pub fn alphabet_len(&self) -> usize {
        self.alphabet.len()
    }

    /// Number of characters to train on.
    pub fn train_len(&self) -> usize {
        self.train.elem_count()
    }

    pub fn held_out(&self) -> &Windows {
        &self.held_out
    }

    pub fn token(&self, c: char) -> u32 {
        token(&self.alphabet, c)
    }

    pub fn char(&self, token: u32) -> char {
        self.alphabet[token as usize]
    }

    /// Draws where the windows of each step begin.
    pub fn draw(&self, steps: usize, windows: usize, seed: u64) -> Result<Batches> {
        let device = self.train.device();
        let mut rng = SmallRng::seed_from_u64(seed);
        let last = (self.train_len() - CONTEXT - 1) as u32;
        let starts = (0..steps * windows).map(|_| rng.random_range(0..=last)).collect();
        Ok(Batches {
            starts: Tensor::from_vec(starts, (steps, windows, 1), device)?,
            places: Tensor::arange(0, CONTEXT as u32 + 1, device)?.unsqueeze(0)?,
        })
    }

    /// The windows of one step.
    pub fn batch(&self, batches: &Batches, step: usize) -> Result<Windows> {
        let indices = batches.starts.get(step)?.broadcast_add(&batches.places)?;
        Windows::split(&self.train.index_select(&indices.flatten_all()?, 0)?.reshape(indices.shape())?)
    }
}

impl Windows {
    /// From windows that are one token longer.
    fn split(longer: &Tensor) -> Result<Self> {
        Ok(Self { inputs: longer.narrow(1, 0, CONTEXT)?, targets: longer.narrow(1, 1, CONTEXT)? })
    }
}

/// Index of `c`; characters that do not occur become the first one.
fn token(alphabet: &[char], c: char) -> u32 {
    alphabet.binary_search(&c).unwrap_or(0) as u32
}

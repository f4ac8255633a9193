//! What one process holds of the gradients.

use std::ops::Range;

use anyhow::{ensure, Result};
use gradclip::{cpu, AllGather, ClipNorm, NormReport};
use mpi::traits::{Communicator, Root};

use crate::model::{fingerprint, Parameters, B2};

/// A part of all parameters but one bias, in the order of [`Parameters`] and cut without regard to layers, as FSDP does
/// it; and a copy of that bias. The last of several processes holds neither.
pub struct Shards {
    rank: usize,
    holders: usize,
    /// The gradients: of the shard, in up to two pieces where the bias would be in it, and of the bias.
    grads: Vec<Vec<f32>>,
    copies: Vec<u32>,
}

impl Shards {
    pub fn of<C: Communicator>(world: &C) -> Self {
        let holders = (world.size() as usize - 1).max(1);
        Self { rank: world.rank() as usize, holders, grads: Vec::new(), copies: Vec::new() }
    }

    /// Processes that hold something.
    pub fn holders(&self) -> usize {
        self.holders
    }

    pub fn describe(&self) -> String {
        let shards: Vec<String> = (0..self.holders)
            .map(|rank| self.shard_of(rank).iter().map(|piece| piece.len()).sum::<usize>().to_string())
            .collect();
        format!("shards of {}; a bias of {} on each of these ranks; nothing on the last", shards.join(", "), B2.len())
    }

    /// Where the shard of a rank lies among the parameters.
    fn shard_of(&self, rank: usize) -> Vec<Range<usize>> {
        if rank >= self.holders {
            return Vec::new();
        }
        let sharded = Parameters::NUMEL - B2.len();
        let (begin, end) = (rank * sharded / self.holders, (rank + 1) * sharded / self.holders);
        // Numbered as if the bias were not there.
        let before = begin.min(B2.start)..end.min(B2.start);
        let behind = begin.max(B2.start) + B2.len()..end.max(B2.start) + B2.len();
        [before, behind].into_iter().filter(|piece| !piece.is_empty()).collect()
    }

    /// Keeps what this process holds of a gradient.
    pub fn take(&mut self, gradient: &[f32]) {
        let shard = self.shard_of(self.rank);
        self.grads = shard.iter().map(|piece| gradient[piece.clone()].to_vec()).collect();
        self.copies = vec![1; shard.len()];
        if self.rank < self.holders {
            self.grads.push(gradient[B2].to_vec());
            self.copies.push(self.holders as u32);
        }
    }

    pub fn clip<E: AllGather>(&mut self, clip: ClipNorm, world: &mut E) -> gradclip::Result<NormReport> {
        cpu::clip_grad_norm_sharded(&mut self.grads, &self.copies, clip, world)
    }

    /// The optimizer's step on what this process holds; then everybody gets everything.
    pub fn step<C: Communicator>(&self, parameters: &mut Parameters, lr: f32, world: &C) -> Result<()> {
        let mut held = self.shard_of(self.rank);
        if self.rank < self.holders {
            held.push(B2);
        }
        for (piece, grad) in held.into_iter().zip(&self.grads) {
            parameters.descend(piece, grad, lr);
        }
        let mut bias = parameters.part_mut(B2).to_vec();
        world.process_at_rank(0).broadcast_into(&mut bias[..]);
        // The copies were clipped by the same coefficient, so they are still the same.
        ensure!(self.rank >= self.holders || bias == parameters.part_mut(B2), "the copies of the bias differ");
        parameters.part_mut(B2).copy_from_slice(&bias);
        for rank in 0..self.holders {
            for piece in self.shard_of(rank) {
                world.process_at_rank(rank as i32).broadcast_into(parameters.part_mut(piece));
            }
        }
        Ok(())
    }

    /// What a broken memory cell or an overflow does.
    pub fn spoil(&mut self) {
        self.grads[0][3] = f32::NAN;
    }

    pub fn fingerprint(&self) -> Vec<u64> {
        self.grads.iter().map(|grad| fingerprint(grad)).collect()
    }
}

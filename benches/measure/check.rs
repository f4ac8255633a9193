//! Answers against the CPU path, bit for bit, before anything is timed.

use super::arena::Arena;
use super::cases::Op;
use super::lists::Entry;
use super::Options;
use anyhow::{ensure, Result};
use bytemuck::Pod;
use gradclip::cpu::{self, AsGrad, AsGradMut};
use gradclip::cuda::Clipper;
use gradclip::{Dtype, NormType};
use half::{bf16, f16};

/// What was compared: the column `checked`.
pub fn check(arena: &Arena, clipper: &mut Clipper, entry: &Entry, options: &Options) -> Result<&'static str> {
    match entry.dtype() {
        Dtype::F64 => check_as::<f64>(arena, clipper, entry, options),
        Dtype::F16 => check_as::<f16>(arena, clipper, entry, options),
        Dtype::BF16 => check_as::<bf16>(arena, clipper, entry, options),
        _ => check_as::<f32>(arena, clipper, entry, options),
    }
}

fn check_as<T: Pod>(arena: &Arena, clipper: &mut Clipper, entry: &Entry, options: &Options) -> Result<&'static str>
where
    Vec<T>: AsGrad + AsGradMut,
{
    let (_, span) = entry.layout();
    if span > options.check_norm {
        return Ok("no");
    }
    let mut grads = arena.grads(entry);
    let original = download::<T>(arena, entry)?;
    let here = cpu::total_norm(&original, NormType::L2)?;
    let there = clipper.total_norm(&grads, NormType::L2)?.wait()?;
    ensure!(here == there, "{} {}: the norm is {here:?} on the CPU, {there:?} on the GPU", entry.list, entry.dtype);
    if span > options.check_bits {
        return Ok("norm");
    }

    let max_norm = there.total_norm * 0.3;
    let mut expected = original.clone();
    let here = cpu::clip_grad_norm(&mut expected, max_norm)?;
    let there = clipper.clip_grad_norm(&mut grads, max_norm)?.wait()?;
    ensure!(here == there, "{} {}: clipped {here:?} on the CPU, {there:?} on the GPU", entry.list, entry.dtype);
    same_bits(&expected, arena, entry, "clipped by norm")?;
    arena.restore(span)?;

    let bound = Op::Value1.bound();
    let mut expected = original;
    let here = cpu::clip_grad_value(&mut expected, bound)?;
    let there = clipper.clip_grad_value(&mut grads, bound)?.wait()?;
    ensure!(here == there, "{} {}: clamped {here:?} on the CPU, {there:?} on the GPU", entry.list, entry.dtype);
    same_bits(&expected, arena, entry, "clipped by value")?;
    arena.restore(span)?;
    Ok("bits")
}

fn download<T: Pod>(arena: &Arena, entry: &Entry) -> Result<Vec<Vec<T>>> {
    let (starts, span) = entry.layout();
    let bytes = arena.download(span)?;
    let tensor = |(start, numel): (&usize, &usize)| {
        let mut tensor = vec![T::zeroed(); *numel];
        bytemuck::cast_slice_mut(&mut tensor).copy_from_slice(&bytes[*start..*start + *numel * size_of::<T>()]);
        tensor
    };
    Ok(starts.iter().zip(&entry.numels).map(tensor).collect())
}

fn same_bits<T: Pod>(expected: &[Vec<T>], arena: &Arena, entry: &Entry, what: &str) -> Result<()> {
    let bits = |tensor: &[T]| bytemuck::cast_slice::<T, u8>(tensor).to_vec();
    for (index, (here, there)) in expected.iter().zip(download::<T>(arena, entry)?).enumerate() {
        ensure!(bits(here) == bits(&there), "{} {}: tensor {index} {what} differs", entry.list, entry.dtype);
    }
    Ok(())
}

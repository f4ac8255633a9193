use gradclip::{cpu, ClipNorm, NormType};
use std::time::Instant;
fn main() {
    let n = 1usize << 28;
    let mut x: Vec<f32> =
        (0..n).map(|i| ((i as u32).wrapping_mul(2654435761) >> 8) as f32 / 16777216.0 - 0.5).collect();
    let gb = (n * 4) as f64 / 1e9;
    let mut time = |name: &str, bytes: f64, f: &mut dyn FnMut()| {
        let mut best = f64::MAX;
        for _ in 0..6 {
            let t = Instant::now();
            f();
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("{name:30} {:.3} ms {:.1} GB/s", best * 1e3, bytes / best);
    };
    time("read u64 xor par", gb, &mut || {
        use rayon::prelude::*;
        let v: &[u64] = bytemuck::cast_slice(&x);
        let s = v
            .par_chunks(1 << 16)
            .map(|c| {
                let mut a = [0u64; 32];
                for k in c.as_chunks::<32>().0 {
                    for i in 0..32 {
                        a[i] ^= k[i];
                    }
                }
                a.iter().fold(0, |a, b| a ^ b)
            })
            .reduce(|| 0, |a, b| a ^ b);
        std::hint::black_box(s);
    });
    for nt in [NormType::L2, NormType::L1, NormType::Inf] {
        time(&format!("norm f32 {nt:?}"), gb, &mut || {
            std::hint::black_box(cpu::total_norm(&[&x[..]], nt).unwrap());
        });
    }
    {
        let b: &[half::bf16] = bytemuck::cast_slice(&x);
        let b = &b.iter().map(|v| half::bf16::from_f32((v.to_bits() as f32) * 1e-6)).collect::<Vec<_>>()[..];
        time("norm bf16 L2", gb, &mut || {
            std::hint::black_box(cpu::total_norm(&[b], NormType::L2).unwrap());
        });
        time("norm bf16 Inf", gb, &mut || {
            std::hint::black_box(cpu::total_norm(&[b], NormType::Inf).unwrap());
        });
        let h = &b.iter().map(|v| half::f16::from_f32(v.to_f32())).collect::<Vec<_>>()[..];
        time("norm f16 L2", gb, &mut || {
            std::hint::black_box(cpu::total_norm(&[h], NormType::L2).unwrap());
        });
        let mut h2 = h.to_vec();
        time("clip value f16", 2.0 * gb, &mut || {
            std::hint::black_box(cpu::clip_grad_value(&mut [&mut h2[..]], 1e5).unwrap());
        });
        let mut b2 = b.to_vec();
        time("clip norm bf16", 3.0 * gb, &mut || {
            std::hint::black_box(cpu::clip_grad_norm(&mut [&mut b2[..]], ClipNorm::new(1e-3)).unwrap());
        });
        time("clip norm f16", 3.0 * gb, &mut || {
            std::hint::black_box(cpu::clip_grad_norm(&mut [&mut h2[..]], ClipNorm::new(1e-3)).unwrap());
        });
    }
    {
        let d: Vec<f64> = x.iter().step_by(2).map(|&v| v as f64).collect();
        time("norm f64 L2", gb, &mut || {
            std::hint::black_box(cpu::total_norm(&[&d[..]], NormType::L2).unwrap());
        });
    }
    let mut y = x.clone();
    time("copy par", 2.0 * gb, &mut || {
        use rayon::prelude::*;
        y.par_chunks_mut(1 << 17).zip(x.par_chunks(1 << 17)).for_each(|(a, b)| a.copy_from_slice(b));
    });
    time("scale inplace naive par", 2.0 * gb, &mut || {
        use rayon::prelude::*;
        y.par_chunks_mut(1 << 17).for_each(|a| {
            for v in a {
                *v *= 0.999;
            }
        });
    });
    time("clip norm f32 (3 pass)", 3.0 * gb, &mut || {
        std::hint::black_box(cpu::clip_grad_norm(&mut [&mut x[..]], ClipNorm::new(1e-3)).unwrap());
    });
    time("clip value f32 none", gb, &mut || {
        std::hint::black_box(cpu::clip_grad_value(&mut [&mut y[..]], 1e5).unwrap());
    });
}

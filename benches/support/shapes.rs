//! Lists of gradients as real models have them: the number of elements of each parameter, in order. Derived from the
//! published architectures; the counts are asserted against the published ones.
#![allow(dead_code)] // every bench uses a part

/// A named list.
pub struct Shapes {
    pub name: &'static str,
    pub numels: Vec<usize>,
}

impl Shapes {
    fn new(name: &'static str, numels: Vec<usize>) -> Self {
        Self { name, numels }
    }

    pub fn total(&self) -> usize {
        self.numels.iter().sum()
    }
}

/// `count` tensors of `numel` elements.
pub fn equal(name: &'static str, count: usize, numel: usize) -> Shapes {
    Shapes::new(name, vec![numel; count])
}

/// ResNet-50: convolutions, each followed by a batch norm's weight and bias, and a classifier.
pub fn resnet50() -> Shapes {
    let mut numels = Vec::new();
    let mut conv = |input: usize, output: usize, kernel: usize| {
        numels.extend([output * input * kernel * kernel, output, output]);
    };
    conv(3, 64, 7);
    let mut input = 64;
    for (width, blocks) in [(64, 3), (128, 4), (256, 6), (512, 3)] {
        for block in 0..blocks {
            conv(input, width, 1);
            conv(width, width, 3);
            conv(width, 4 * width, 1);
            if block == 0 {
                conv(input, 4 * width, 1);
            }
            input = 4 * width;
        }
    }
    numels.extend([2048 * 1000, 1000]);
    Shapes::new("ResNet-50", numels)
}

/// A layer of GPT-2 or of ViT: two norms, attention, MLP, all with biases.
fn transformer_layer(d: usize) -> [usize; 12] {
    [d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]
}

/// GPT-2 with 124 M parameters.
pub fn gpt2() -> Shapes {
    let d = 768;
    let mut numels = vec![50257 * d, 1024 * d];
    numels.extend((0..12).flat_map(|_| transformer_layer(d)));
    numels.extend([d, d]);
    Shapes::new("GPT-2", numels)
}

/// GPT-2 XL: 48 layers of width 1600.
pub fn gpt2_xl() -> Shapes {
    let d = 1600;
    let mut numels = vec![50257 * d, 1024 * d];
    numels.extend((0..48).flat_map(|_| transformer_layer(d)));
    numels.extend([d, d]);
    Shapes::new("GPT-2 XL", numels)
}

/// ViT-B/16: class token, patch embedding, positions, 12 layers, norm, head.
pub fn vit_b16() -> Shapes {
    let d = 768;
    let mut numels = vec![d, 3 * 16 * 16 * d, d, 197 * d];
    numels.extend((0..12).flat_map(|_| transformer_layer(d)));
    numels.extend([d, d, 1000 * d, 1000]);
    Shapes::new("ViT-B/16", numels)
}

/// Mamba-130M: 24 layers of A_log, D, in_proj, conv and bias, x_proj, dt_proj and bias, out_proj, norm.
pub fn mamba_130m() -> Shapes {
    let (d, inner, state, rank) = (768, 1536, 16, 48);
    let layer = [
        inner * state,
        inner,
        2 * inner * d,
        inner * 4,
        inner,
        (rank + 2 * state) * inner,
        inner * rank,
        inner,
        d * inner,
        d,
    ];
    let mut numels = vec![50280 * d];
    numels.extend((0..24).flat_map(|_| layer));
    numels.push(d);
    Shapes::new("Mamba-130M", numels)
}

/// Llama-3.2-1B: 16 layers of q, k, v, o, gate, up, down and two norms; the head is the embedding.
pub fn llama_1b() -> Shapes {
    let (d, kv, ff) = (2048, 512, 8192);
    let mut numels = vec![128_256 * d];
    numels.extend((0..16).flat_map(|_| [d * d, kv * d, kv * d, d * d, ff * d, ff * d, d * ff, d, d]));
    numels.push(d);
    Shapes::new("Llama-3.2-1B", numels)
}

/// Llama-3-8B: 32 layers as above; embedding and head apart.
pub fn llama_8b() -> Shapes {
    let (d, kv, ff) = (4096, 1024, 14336);
    let mut numels = vec![128_256 * d];
    numels.extend((0..32).flat_map(|_| [d * d, kv * d, kv * d, d * d, ff * d, ff * d, d * ff, d, d]));
    numels.extend([d, 128_256 * d]);
    Shapes::new("Llama-3-8B", numels)
}

/// Qwen3-30B-A3B, each expert's matrices as tensors of their own: 48 layers of q, k, v, o, the norms of q and k, the
/// router, 128 experts of gate, up and down, and two norms.
pub fn qwen3_30b() -> Shapes {
    let (d, ff, q, kv, head, experts) = (2048, 768, 4096, 512, 128, 128);
    let mut layer = vec![q * d, kv * d, kv * d, d * q, head, head, experts * d];
    layer.extend((0..experts).flat_map(|_| [ff * d, ff * d, d * ff]));
    layer.extend([d, d]);
    let mut numels = vec![151_936 * d];
    numels.extend((0..48).flat_map(|_| layer.clone()));
    numels.extend([d, 151_936 * d]);
    Shapes::new("Qwen3-30B-A3B", numels)
}

/// What one of `ways` processes holds of a list whose tensors are cut along their first dimension. All of them divide.
pub fn shard(name: &'static str, whole: Shapes, ways: usize) -> Shapes {
    assert!(whole.numels.iter().all(|numel| numel % ways == 0), "{} in {ways}", whole.name);
    Shapes::new(name, whole.numels.iter().map(|numel| numel / ways).collect())
}

/// LoRA of rank 16 on all seven projections of Llama-3-8B.
pub fn lora() -> Shapes {
    let (d, kv, ff, rank): (usize, usize, usize, usize) = (4096, 1024, 14336, 16);
    let projections = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)];
    let pairs = |(input, output)| [rank * input, output * rank];
    Shapes::new("LoRA r16", (0..32).flat_map(|_| projections).flat_map(pairs).collect())
}

/// Tensors and elements against what is published.
pub fn check() {
    let published = [
        (resnet50(), 161, 25_557_032),
        (vit_b16(), 152, 86_567_656),
        (gpt2(), 148, 124_439_808),
        (mamba_130m(), 242, 129_135_360),
        (llama_1b(), 146, 1_235_814_400),
        (lora(), 448, 41_943_040),
        (gpt2_xl(), 580, 1_557_611_200),
        (llama_8b(), 291, 8_030_261_248),
        (qwen3_30b(), 18_867, 30_532_122_624),
    ];
    for (shapes, tensors, elements) in published {
        assert_eq!((shapes.numels.len(), shapes.total()), (tensors, elements), "{}", shapes.name);
    }
}

//! Lists of gradients as real models have them: the number of elements of each parameter, in order. Derived from the
//! published architectures; the totals are asserted against the published parameter counts.

/// A named list.
pub struct Shapes {
    pub name: &'static str,
    pub numels: Vec<usize>,
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
    Shapes { name: "ResNet-50", numels }
}

/// GPT-2 with `layers` of width `d`.
fn gpt2(name: &'static str, layers: usize, d: usize) -> Shapes {
    let mut numels = vec![50257 * d, 1024 * d];
    for _ in 0..layers {
        numels.extend([d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]);
    }
    numels.extend([d, d]);
    Shapes { name, numels }
}

/// GPT-2, 124 M parameters.
pub fn gpt2_small() -> Shapes {
    gpt2("GPT-2 124M", 12, 768)
}

/// ViT-B/16: patch embedding, class token, positions, 12 layers, norm, head.
pub fn vit_b16() -> Shapes {
    let d = 768;
    let mut numels = vec![d, 3 * 16 * 16 * d, d, 197 * d];
    for _ in 0..12 {
        numels.extend([d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]);
    }
    numels.extend([d, d, 1000 * d, 1000]);
    Shapes { name: "ViT-B/16", numels }
}

/// `count` tensors of `numel` elements.
pub fn equal(name: &'static str, count: usize, numel: usize) -> Shapes {
    Shapes { name, numels: vec![numel; count] }
}

/// Tensors and elements against what is published.
pub fn check() {
    let published = [(resnet50(), 161, 25_557_032), (vit_b16(), 152, 86_567_656), (gpt2_small(), 148, 124_439_808)];
    for (shapes, tensors, elements) in published {
        assert_eq!((shapes.numels.len(), shapes.numels.iter().sum::<usize>()), (tensors, elements), "{}", shapes.name);
    }
}

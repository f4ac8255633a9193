//! Clips one tensor per line with burn: `norm|value THRESHOLD DTYPE BYTES` in, the bytes of the clipped tensor out.
//! The threshold is the bits of an f32, bytes are hexadecimal, little-endian, and `-` where there are none.

use burn_core::tensor::{DType, Tensor, TensorData};
use burn_optim::grad_clipping::GradientClipping;
use std::io::BufRead;

fn main() {
    for line in std::io::stdin().lock().lines() {
        println!("{}", clip(&line.expect("stdin is text")));
    }
}

fn clip(line: &str) -> String {
    let [how, threshold, dtype, bytes] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("four words: {line}") };
    let threshold = f32::from_bits(u32::from_str_radix(threshold, 16).expect("hexadecimal"));
    let (dtype, size) = match dtype {
        "f32" => (DType::F32, 4),
        "f64" => (DType::F64, 8),
        "f16" => (DType::F16, 2),
        "bf16" => (DType::BF16, 2),
        other => panic!("dtype {other}"),
    };
    let bytes: Vec<u8> =
        (0..bytes.len() / 2).map(|i| u8::from_str_radix(&bytes[2 * i..2 * i + 2], 16).expect("hexadecimal")).collect();
    let shape = [bytes.len() / size];
    let grad = Tensor::<1>::from_data(TensorData::from_bytes_vec(bytes, shape, dtype), (&Default::default(), dtype));
    let clipping = match how {
        "norm" => GradientClipping::Norm(threshold),
        "value" => GradientClipping::Value(threshold),
        other => panic!("clip by {other}"),
    };
    let clipped = clipping.clip_gradient(grad).into_data();
    assert_eq!(clipped.dtype(), dtype, "burn changed the type");
    let hex: String = clipped.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    if hex.is_empty() {
        "-".into()
    } else {
        hex
    }
}

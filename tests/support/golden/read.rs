//! Reading the golden files.

use super::super::tensor::Tensor;
use super::{Case, Golden, Op, Preset, Sharing};
use gradclip::{Dtype, NonFinite, NormType};
use std::path::{Path, PathBuf};

/// The folder of the golden files.
pub fn folder() -> PathBuf {
    let packed = std::env::var_os("GRADCLIP_GOLDEN").map(PathBuf::from);
    packed.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"))
}

#[derive(serde::Deserialize)]
struct File {
    cases: Vec<Entry>,
}

#[derive(serde::Deserialize)]
struct Entry {
    name: String,
    peer: String,
    op: String,
    max_norm: Option<String>,
    norm_type: Option<String>,
    eps: Option<String>,
    lo: Option<String>,
    hi: Option<String>,
    grads: Vec<Values>,
    exact_norm: Option<String>,
    peer_norm: Option<String>,
    peer_grads: Option<Vec<String>>,
    exact_grads: Option<Vec<String>>,
    peer_differs: Option<String>,
    preset: Option<String>,
    arguments: Option<Vec<String>>,
    nonfinite: Option<String>,
    scope: Option<String>,
    groups: Option<Vec<usize>>,
    max_norms: Option<Vec<Option<String>>>,
    rows: Option<Vec<usize>>,
    exact_norms: Option<Vec<String>>,
    peer_norms: Option<Vec<String>>,
    loss_scale: Option<String>,
    peer_found_inf: Option<bool>,
    total_norm: Option<String>,
}

#[derive(serde::Deserialize)]
struct Values {
    dtype: String,
    bits: String,
    numel: Option<usize>,
    stride: Option<usize>,
}

/// The cases of one file. A file that cannot be read is a broken checkout: panics.
pub fn read(file: &str) -> Vec<Golden> {
    let path = folder().join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file: File = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    file.cases.into_iter().map(Entry::into_golden).collect()
}

impl Entry {
    fn into_golden(self) -> Golden {
        let op = match self.op.as_str() {
            "total_norm" => Op::TotalNorm(self.norm_type()),
            "clip_grad_norm" => Op::ClipNorm {
                max_norm: required(&self.max_norm),
                norm_type: self.norm_type(),
                eps: required(&self.eps),
                loss_scale: self.loss_scale.as_deref().map_or(1.0, number),
                nonfinite: match self.nonfinite.as_deref() {
                    None | Some("skip") => NonFinite::Skip,
                    Some("propagate") => NonFinite::Propagate,
                    Some(other) => panic!("{}: unknown policy {other}", self.name),
                },
            },
            "clip_with_norm" => Op::ClipWithNorm {
                total_norm: required(&self.total_norm),
                max_norm: required(&self.max_norm),
                eps: required(&self.eps),
                nonfinite: NonFinite::Skip,
            },
            "clip_grad_value" => Op::ClipValue { lo: required(&self.lo), hi: required(&self.hi) },
            other => panic!("{}: unknown op {other}", self.name),
        };
        let tensors_of = |strings: &Vec<String>| -> Vec<Tensor> {
            assert_eq!(strings.len(), self.grads.len(), "{}", self.name);
            strings.iter().zip(&self.grads).map(|(bits, like)| like.tensor(bits)).collect()
        };
        Golden {
            exact_norm: self.exact_norm.as_deref().map(number),
            exact_grads: self.exact_grads.as_ref().map(tensors_of),
            peer_norm: self.peer_norm.as_deref().map(number),
            peer_grads: self.peer_grads.as_ref().map(tensors_of),
            peer_differs: self.peer_differs.clone(),
            peer_found_inf: self.peer_found_inf,
            exact_norms: self.exact_norms.as_ref().map(|norms| norms.iter().map(|norm| number(norm)).collect()),
            peer_norms: self.peer_norms.as_ref().map(|norms| norms.iter().map(|norm| number(norm)).collect()),
            peer: self.peer.clone(),
            case: Case {
                name: self.name.clone(),
                op,
                grads: self.grads.iter().map(|values| values.tensor(&values.bits)).collect(),
                preset: self.preset.as_ref().map(|name| Preset {
                    name: name.clone(),
                    arguments: self.arguments.iter().flatten().map(|text| number(text)).collect(),
                }),
                sharing: match self.scope.as_deref() {
                    None | Some("global") => None,
                    Some("tensor") => Some(Sharing::Tensor),
                    Some("group") => Some(Sharing::Group {
                        of: self.groups.clone().unwrap_or_default(),
                        max_norms: self.max_norms.iter().flatten().map(|text| text.as_deref().map(number)).collect(),
                    }),
                    Some("row") => Some(Sharing::Row(self.rows.clone().unwrap_or_default())),
                    Some(other) => panic!("{}: unknown scope {other}", self.name),
                },
            },
        }
    }

    fn norm_type(&self) -> NormType {
        if self.norm_type.as_deref() == Some("rms") {
            return NormType::Rms;
        }
        let order = self.norm_type.as_deref().and_then(|text| text.parse::<f64>().ok());
        order.unwrap_or_else(|| panic!("{}: unknown norm_type {:?}", self.name, self.norm_type)).into()
    }
}

impl Values {
    /// `bits` as a tensor of this one's type and shape: a table is read with a stride, modulo its length.
    fn tensor(&self, bits: &str) -> Tensor {
        let dtype = match self.dtype.as_str() {
            "f32" => Dtype::F32,
            "f64" => Dtype::F64,
            "f16" => Dtype::F16,
            "bf16" => Dtype::BF16,
            other => panic!("unknown dtype {other}"),
        };
        let digits = 2 * dtype.size();
        assert!(bits.is_ascii() && bits.len().is_multiple_of(digits), "not a whole number of values");
        let table: Vec<u64> = (0..bits.len()).step_by(digits).map(|at| hexadecimal(&bits[at..at + digits])).collect();
        let (numel, stride) = (self.numel.unwrap_or(table.len()), self.stride.unwrap_or(1));
        Tensor::from_bits(dtype, (0..numel).map(|i| table[i * stride % table.len()]))
    }
}

fn required(text: &Option<String>) -> f64 {
    number(text.as_deref().unwrap_or_else(|| panic!("a parameter is missing")))
}

/// 16 hexadecimal digits, the bits of an f64.
fn number(text: &str) -> f64 {
    assert_eq!(text.len(), 16);
    f64::from_bits(hexadecimal(text))
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|error| panic!("{text}: {error}"))
}

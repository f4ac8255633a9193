//! The cost contract in bytes: what each kernel reads of the gradients, and writes.

use crate::suite::data::{tensor, Source, Tensor, Values, DTYPES};
use crate::suite::device::OnDevice;
use crate::support::double::{self, Double, KernelRun};
use gradclip::cuda::{self, Clipper, DeviceGradMut};
use gradclip::{Dtype, NormType, Scope};

const SEGMENT: usize = 4 * 1024;
const TILE: usize = 32 * 1024;
const PACK: usize = 16;

struct Bench<'a> {
    double: &'a Double,
    clipper: Clipper,
}

impl Bench<'_> {
    /// The kernels that `call` runs on `list`.
    fn runs(
        &mut self,
        list: &[Tensor],
        call: impl FnOnce(&mut Clipper, &mut [&mut dyn DeviceGradMut]),
    ) -> Vec<KernelRun> {
        let mut device = OnDevice::upload(self.clipper.stream(), list);
        self.double.reset_counters();
        device.with(list, |grads| call(&mut self.clipper, grads));
        self.double.kernel_runs()
    }

    fn norm(&mut self, list: &[Tensor], norm_type: NormType) -> KernelRun {
        let runs = self.runs(list, |clipper, grads| drop(clipper.total_norm(grads, norm_type).unwrap()));
        let [partials, coef] = <[KernelRun; 2]>::try_from(runs).unwrap();
        assert_eq!(coef, run("clip_coef", 0, 0));
        partials
    }
}

fn with_bench(body: impl FnOnce(Bench<'_>)) {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let clipper = Clipper::new(&context.default_stream()).unwrap();
    body(Bench { double: &double, clipper });
    assert_eq!(double.violated_guards(), 0);
}

fn run(symbol: &str, read: usize, written: usize) -> KernelRun {
    KernelRun { symbol: symbol.into(), read: read as u64, read_shared: 0, written: written as u64 }
}

fn partials_of(norm_type: NormType) -> &'static str {
    match norm_type {
        NormType::L1 => "norm_partials_l1",
        NormType::Inf => "norm_partials_inf",
        _ => "norm_partials_l2",
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.values.numel() * tensor.values.dtype().size()
}

/// Tensors of one type, with ends at and around the borders of packs, segments and tiles.
fn list_of(dtype: Dtype, offset: usize) -> Vec<Tensor> {
    let mut source = Source::new(7);
    let size = dtype.size();
    let numels = [0, 1, PACK / size + 1, SEGMENT / size, TILE / size - 1, 3 * TILE / size, 2 * TILE / size + 3];
    numels.iter().map(|&numel| source.tensor(dtype, numel, offset)).collect()
}

const NORMS: [NormType; 3] = [NormType::L1, NormType::L2, NormType::Inf];

#[test]
fn a_norm_reads_each_byte_once_and_writes_none() {
    with_bench(|mut bench| {
        let lists = DTYPES.map(|dtype| list_of(dtype, 0));
        for list in lists.iter().chain([&lists.concat()]) {
            let bytes: usize = list.iter().map(bytes_of).sum();
            for norm_type in NORMS {
                assert_eq!(bench.norm(list, norm_type), run(partials_of(norm_type), bytes, 0));
            }
        }
    });
}

/// A misaligned tensor is summed in the same packs, each made of two aligned ones, which neighbours share in L1. So the
/// inner segments ask twice for each byte, of L1; the ends are read element by element.
#[test]
fn a_norm_of_misaligned_tensors_asks_l1_twice() {
    with_bench(|mut bench| {
        for dtype in DTYPES {
            let size = dtype.size();
            let offset = if dtype == Dtype::F64 { 1 } else { 3 }; // in elements, none of them at 16 bytes
            let list = [Source::new(8).tensor(dtype, 20 * SEGMENT / size + 1, offset)];
            for norm_type in NORMS {
                // Not the first segment, nor the last whole one, whose second pack may lie beyond the tensor's end.
                let expected = KernelRun {
                    symbol: partials_of(norm_type).into(),
                    read: (2 * SEGMENT + size) as u64,
                    read_shared: (2 * 18 * SEGMENT) as u64,
                    written: 0,
                };
                assert_eq!(bench.norm(&list, norm_type), expected, "{dtype:?}");
            }
        }
    });
}

#[test]
fn segments_out_of_the_safe_range_are_read_again() {
    with_bench(|mut bench| {
        // The first three segments of many; the others are usual.
        let with = |dtype: Dtype, value: f64| {
            let mut source = Source::new(9);
            let numel = 2 * TILE / dtype.size();
            let usual = (0..numel).map(|_| source.bell()).collect::<Vec<_>>();
            let end = 3 * SEGMENT / dtype.size();
            let values = usual.iter().enumerate().map(|(i, x)| if i < end { value } else { *x });
            tensor(dtype, &values.collect::<Vec<_>>())
        };
        let cases = [
            (Dtype::F32, 0.0, 1), // a look at the largest magnitude says all
            (Dtype::F16, 0.0, 1),
            (Dtype::F32, f64::NAN, 1),
            (Dtype::BF16, f64::INFINITY, 1),
            (Dtype::F32, 1e30, 2), // squares beyond f32: once more for the largest, once for the sum in f64
            (Dtype::F32, 1e-30, 2),
            (Dtype::BF16, 1e30, 2),
            (Dtype::F64, 1e200, 2),
            (Dtype::F64, 1e-200, 2),
            (Dtype::F16, 60000.0, 0), // f32 holds the squares of all f16
            (Dtype::F32, 1e3, 0),
        ];
        for (dtype, value, again) in cases {
            let list = [with(dtype, value)];
            let expected = run("norm_partials_l2", 2 * TILE + again * 3 * SEGMENT, 0);
            assert_eq!(bench.norm(&list, NormType::L2), expected, "{dtype:?} {value}");
            // The largest magnitude is that from the start.
            assert_eq!(bench.norm(&list, NormType::Inf), run("norm_partials_inf", 2 * TILE, 0), "{dtype:?} {value}");
        }
    });
}

#[test]
fn clipping_by_norm_reads_once_or_reads_twice_and_writes_once() {
    with_bench(|mut bench| {
        for offset in [0, 1] {
            let list: Vec<Tensor> = DTYPES.iter().flat_map(|&dtype| list_of(dtype, offset)).collect();
            let bytes: usize = list.iter().map(bytes_of).sum();
            for (max_norm, scaled) in [(1e6, 0), (1e-3, bytes), (0.0, bytes), (1e-30, bytes)] {
                let runs = bench.runs(&list, |clipper, grads| drop(clipper.clip_grad_norm(grads, max_norm).unwrap()));
                let [partials, coef, scale] = <[KernelRun; 3]>::try_from(runs).unwrap();
                if offset == 0 {
                    assert_eq!(partials, run("norm_partials_l2", bytes, 0));
                }
                assert_eq!((partials.written, coef), (0, run("clip_coef", 0, 0)));
                assert_eq!(scale, run("scale", scaled, scaled), "max_norm {max_norm}, offset {offset}");
            }
        }
    });
}

/// Clipped or not: the gradients' bytes, and those of the outputs. Where an output lies otherwise than its gradient, L1 is
/// asked twice for what is not at the ends.
#[test]
fn clipping_out_of_place_reads_twice_and_writes_once() {
    with_bench(|mut bench| {
        for (offset, out_offset) in [(0, 0), (1, 1), (0, 1), (1, 0), (4, 0)] {
            for to_f32 in [false, true] {
                let list: Vec<Tensor> = DTYPES.iter().flat_map(|&dtype| list_of(dtype, offset)).collect();
                let like = |grad: &Tensor| if to_f32 { Dtype::F32 } else { grad.values.dtype() };
                let zeros = |grad: &Tensor| tensor(like(grad), &vec![0.0; grad.values.numel()]);
                let outputs: Vec<Tensor> =
                    list.iter().map(|grad| Tensor { offset: out_offset, ..zeros(grad) }).collect();
                let (bytes, out_bytes): (usize, usize) =
                    (list.iter().map(bytes_of).sum(), outputs.iter().map(bytes_of).sum());
                let mut device = OnDevice::upload(bench.clipper.stream(), &list);
                let mut out_device = OnDevice::upload(bench.clipper.stream(), &outputs);
                for max_norm in [1e6, 1e-3, 1e-30] {
                    bench.double.reset_counters();
                    device.with(&list, |grads| {
                        out_device.with(&outputs, |outputs| {
                            drop(bench.clipper.clip_grad_norm_into(grads, outputs, max_norm).unwrap());
                        });
                    });
                    let [_, coef, scale] = <[KernelRun; 3]>::try_from(bench.double.kernel_runs()).unwrap();
                    assert_eq!(coef, run("clip_coef", 0, 0));
                    let what = format!("offsets {offset} and {out_offset}, to f32: {to_f32}, max_norm {max_norm}");
                    assert_eq!((scale.symbol.as_str(), scale.written), ("scale_into", out_bytes as u64), "{what}");
                    assert_eq!(scale.read + scale.read_shared / 2, bytes as u64, "{what}");
                    // A tiny coefficient takes the elements one by one.
                    // Of f16, 8 bytes are a unit where they become 16 of f32.
                    let aligned = offset == out_offset || (offset == 4 && to_f32);
                    assert_eq!(scale.read_shared > 0, !aligned && max_norm > 1e-20, "{what}");
                }
            }
        }
    });
}

/// Bytes of the packs that hold a changed element; at the ends of a tile, where no whole pack fits, the element's own.
fn bytes_to_write(tensor: &Tensor, address: usize, changes: impl Fn(f64) -> bool) -> usize {
    let size = tensor.values.dtype().size();
    let places: Vec<usize> = (0..tensor.values.numel()).map(|i| address + i * size).collect();
    let mut packs = std::collections::BTreeSet::new();
    let mut singles = 0;
    for (place, _) in places.iter().zip(tensor.values.values()).filter(|(_, x)| changes(*x)) {
        let tile = (place - address) / TILE;
        let (begin, end) = (address + tile * TILE, address + (tile * TILE + TILE).min(places.len() * size));
        let pack = place / PACK * PACK;
        if begin <= pack && pack + PACK <= end {
            packs.insert(pack);
        } else {
            singles += 1;
        }
    }
    packs.len() * PACK + singles * size
}

#[test]
fn clipping_by_value_reads_once_and_writes_what_changes() {
    with_bench(|mut bench| {
        for offset in [0, 1] {
            let list: Vec<Tensor> = DTYPES.iter().flat_map(|&dtype| list_of(dtype, offset)).collect();
            let bytes: usize = list.iter().map(bytes_of).sum();
            // Data is within 4e-2 of 0: nothing outside, about one in a hundred, next to all.
            let mut writes = Vec::new();
            for bound in [1.0, 2.7e-2, 1e-9] {
                let mut device = OnDevice::upload(bench.clipper.stream(), &list);
                let expected: usize = list
                    .iter()
                    .enumerate()
                    .map(|(i, tensor)| bytes_to_write(tensor, device.address(i) as usize, |x| x.abs() > bound))
                    .sum();
                bench.double.reset_counters();
                device.with(&list, |grads| drop(bench.clipper.clip_grad_value(grads, bound).unwrap()));
                let runs = bench.double.kernel_runs();
                let counts = run("clamp_counts", 0, 0);
                assert_eq!(runs, [run("clamp", bytes, expected), counts], "bound {bound}, offset {offset}");
                // With counts of each tensor: not a byte more.
                let mut device = OnDevice::upload(bench.clipper.stream(), &list);
                bench.double.reset_counters();
                let scope = Scope::per_tensor();
                device.with(&list, |grads| drop(bench.clipper.clip_grad_value_by(grads, &scope, bound).unwrap()));
                let counts = run("scoped_clamp_counts", 0, 0);
                let runs = bench.double.kernel_runs();
                assert_eq!(runs, [run("scoped_clamp", bytes, expected), counts], "bound {bound}, offset {offset}");
                writes.push(expected as f64 / bytes as f64);
            }
            assert!(writes[0] == 0.0 && (0.01..0.2).contains(&writes[1]) && writes[2] > 0.9, "{writes:?}");
        }
    });
}

#[test]
fn an_empty_list_moves_nothing() {
    with_bench(|mut bench| {
        let list = [Tensor { values: Values::from_f64(Dtype::F32, []), offset: 0 }];
        let runs = bench.runs(&list, |clipper, grads| drop(clipper.clip_grad_norm(grads, 1.0).unwrap()));
        assert_eq!(runs, [run("clip_coef", 0, 0)]);
    });
}

//! Every kernel, in few launches of small lists, bit for bit against the CPU path: the smoke of a GPU, and what the
//! sanitizers run. `tests/double_suite/every_kernel.rs` counts that none is left out.

use super::data::{bits, tensor, Source, Tensor, DTYPES};
use super::device::OnDevice;
use super::into::{self, Output, PAIRS};
use super::shards::Case;
use super::{parity, scoped};
use crate::backend::with_clipper;
use gradclip::cuda::Clipper;
use gradclip::{cpu, ClipNorm, ClipValue, Dtype, NormType, Scope};

/// One for each kernel of a stage: any order is a kernel of its own, the mean square is that of L2 with another end.
const NORM_TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0), NormType::Rms];

/// Each type: a whole tile and a bit, off alignment; an end of a few elements; values whose squares leave the range.
fn list(source: &mut Source) -> Vec<Tensor> {
    let mut list = vec![tensor(Dtype::F32, &[])];
    for dtype in DTYPES {
        list.push(source.tensor(dtype, 32 * 1024 / dtype.size() + 5, 1));
        list.push(source.tensor(dtype, 70, 0));
    }
    list.push(tensor(Dtype::F32, &[1e-30, -1e25, 3.0]));
    list
}

macro_rules! parts {
    ($($part:ident)*) => {
        /// What the tests of this file run.
        #[allow(dead_code)] // for the count on the double
        pub fn run_all(clipper: &mut Clipper) {
            $(on::$part(clipper);)*
        }

        $(
            #[test]
            fn $part() {
                with_clipper(on::$part);
            }
        )*
    };
}

parts!(norms values given_norms out_of_place groups groups_with_telemetry groups_of_values ranks);

mod on {
    use super::*;

    pub fn norms(clipper: &mut Clipper) {
        let list = list(&mut Source::new(61));
        for norm_type in NORM_TYPES {
            let clip = ClipNorm::new(1e-3).norm_type(norm_type);
            assert!(parity::assert_norm_parity(clipper, &list, clip, &format!("{norm_type:?}")).written);
        }
    }

    pub fn values(clipper: &mut Clipper) {
        parity::assert_value_parity(clipper, &list(&mut Source::new(62)), ClipValue::between(-0.01, 0.02), "value");
    }

    /// By a norm from elsewhere, which says nothing of NaN and Inf in the gradients.
    pub fn given_norms(clipper: &mut Clipper) {
        let mut list = list(&mut Source::new(63));
        list.push(tensor(Dtype::BF16, &[f64::NAN, 1.0, f64::INFINITY]));
        parity::assert_given_parity(clipper, &list, 2.0, ClipNorm::new(1.0), "given");
    }

    pub fn out_of_place(clipper: &mut Clipper) {
        let mut source = Source::new(64);
        let (mut grads, mut outputs) = (Vec::new(), Vec::new());
        for (index, (from, to)) in PAIRS.into_iter().enumerate() {
            let numel = 32 * 1024 / from.size() + 5;
            grads.push(source.tensor(from, numel, 1));
            outputs.push(Output::new(to, numel, index % 2));
        }
        assert!(into::assert_parity(clipper, &grads, &outputs, ClipNorm::new(1e-3), "into").written);
    }

    fn scoped_by(clipper: &mut Clipper, telemetry: bool) {
        let list = list(&mut Source::new(65));
        let groups: Vec<usize> = (0..list.len()).map(|index| index % 3).collect();
        let scope = Scope::groups(&groups);
        let scope = if telemetry { scope.telemetry() } else { scope };
        for norm_type in NORM_TYPES {
            let clip = ClipNorm::new(1e-3).norm_type(norm_type);
            let report = scoped::assert_same(clipper, &list, &scope, clip, &format!("{norm_type:?}"));
            assert_eq!(report.num_written(), 3);
        }
    }

    pub fn groups(clipper: &mut Clipper) {
        scoped_by(clipper, false);
    }

    pub fn groups_with_telemetry(clipper: &mut Clipper) {
        scoped_by(clipper, true);
    }

    pub fn groups_of_values(clipper: &mut Clipper) {
        let list = list(&mut Source::new(66));
        let (mut on_cpu, mut there) = (list.clone(), list.clone());
        let report = cpu::clip_grad_value_by(&mut on_cpu, &Scope::per_tensor(), 0.01).unwrap();
        let mut device = OnDevice::upload(clipper.stream(), &list);
        let pending =
            device.with(&list, |grads| clipper.clip_grad_value_by(grads, &Scope::per_tensor(), 0.01)).unwrap();
        assert_eq!(pending.wait().unwrap(), report);
        device.download(&mut there);
        assert_eq!(bits(&there), bits(&on_cpu));
    }

    /// Two ranks, which share gradients; as threads of this process, on a stream each.
    pub fn ranks(clipper: &mut Clipper) {
        let mut source = Source::new(67);
        let lists = [list(&mut source), vec![source.tensor(Dtype::F64, 5000, 0)]];
        let copies = [(0..lists[0].len() as u32).map(|index| 1 + index % 2).collect(), vec![1]];
        for norm_type in [NormType::L2, NormType::P(3.0)] {
            let clip = ClipNorm::new(1e-3).norm_type(norm_type);
            Case { lists: &lists, copies: &copies, clip }.assert_same(clipper, norm_type, "ranks");
        }
    }
}

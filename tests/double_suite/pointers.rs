//! What a driver may say about a raw pointer: no answer that a valid gradient can get refuses it, and each answer that
//! proves a gradient bad does.

use crate::support::double::{self, Double};
use cudarc::driver::sys::CUpointer_attribute::{self, *};
use cudarc::driver::DevicePtr;
use gradclip::cuda::{self, Clipper, RawGrad};
use gradclip::{Dtype, Error, NormType, Result};

/// Of the gradient in all tests here: four elements of f32, on cuda:0.
const BYTES: u64 = 16;
const NUMEL: usize = 4;

const HOST: u64 = 1;
const DEVICE: u64 = 2;
const ARRAY: u64 = 3;
const UNIFIED: u64 = 4;

/// Where the driver says that the range around the pointer is: its beginning before the pointer and its end after it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Range {
    Unanswered,
    OnlyStart,
    OnlySize,
    /// The gradient's own allocation.
    Exact,
    /// A block of a pool, an arena, a reserved range.
    Around,
    /// Ends before the last element.
    Short,
    Before,
    After,
}

/// What the driver says about one address. None: it does not answer.
#[derive(Clone, Copy, Debug)]
struct Says {
    kind: Option<u64>,
    device: Option<i32>,
    managed: bool,
    mapped: bool,
    range: Range,
    context: bool,
    pool: bool,
}

/// Device memory of `cuMemAlloc`.
const ALLOCATED: Says = Says {
    kind: Some(DEVICE),
    device: Some(0),
    managed: false,
    mapped: true,
    range: Range::Exact,
    context: true,
    pool: false,
};
/// Of `cuMemAllocAsync`: it has no context (CUDA programming guide, "Stream-Ordered Memory Allocator").
const OF_A_POOL: Says = Says { context: false, pool: true, ..ALLOCATED };
/// Of `cuMemMap`.
const VIRTUAL: Says = Says { context: false, range: Range::Around, ..ALLOCATED };
const MANAGED: Says = Says { managed: true, ..ALLOCATED };
const UNKNOWN: Says = Says {
    kind: None,
    device: None,
    managed: false,
    mapped: false,
    range: Range::Unanswered,
    context: false,
    pool: false,
};

impl Says {
    fn play(&self, double: &Double, address: u64) {
        const INVALID_VALUE: i32 = 1;
        const NOT_SUPPORTED: i32 = 801;
        let say = |attribute: CUpointer_attribute, answer: Option<u64>| {
            // The code does not matter, as the question is about several attributes.
            let refusal = if attribute as i32 % 2 == 0 { INVALID_VALUE } else { NOT_SUPPORTED };
            double.answer(address, attribute as i32, answer.ok_or(refusal));
        };
        let (start, size) = match self.range {
            Range::Unanswered => (None, None),
            Range::OnlyStart => (Some(address), None),
            Range::OnlySize => (None, Some(BYTES)),
            Range::Exact => (Some(address), Some(BYTES)),
            Range::Around => (Some(address - 4096), Some(1 << 20)),
            Range::Short => (Some(address - 4096), Some(4096 + BYTES - 4)),
            Range::Before => (Some(address - 4096), Some(4096)),
            Range::After => (Some(address + 4), Some(4096)),
        };
        say(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, self.kind);
        say(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, self.device.map(|device| u64::from(device as u32)));
        say(CU_POINTER_ATTRIBUTE_IS_MANAGED, Some(self.managed.into()));
        say(CU_POINTER_ATTRIBUTE_MAPPED, Some(self.mapped.into()));
        say(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, start);
        say(CU_POINTER_ATTRIBUTE_RANGE_SIZE, size);
        say(CU_POINTER_ATTRIBUTE_CONTEXT, Some(if self.context { address } else { 0 }));
        say(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, Some(if self.pool { address } else { 0 }));
    }

    /// What of this proves that nothing at the address belongs to a gradient on cuda:0.
    fn proofs(&self) -> Vec<&'static str> {
        let known = self.kind.is_some() || self.mapped || self.managed || self.context || self.pool;
        [
            (!known, "host or freed memory"),
            (!self.managed && self.kind == Some(HOST), "host memory"),
            (!self.managed && self.device == Some(-1), "host memory"),
            (!self.managed && self.kind == Some(ARRAY), "array"),
            (!self.managed && self.device == Some(1), "on cuda:1"),
        ]
        .iter()
        .filter_map(|&(holds, text)| holds.then_some(text))
        .collect()
    }
}

/// A gradient, and a clipper to ask with.
struct Bench<'a> {
    double: &'a Double,
    clipper: Clipper,
    address: u64,
}

impl Bench<'_> {
    /// What becomes of the gradient if the driver says this, and `beyond` of the address after the short range.
    fn check(&mut self, says: Says, beyond: Says) -> Result<()> {
        says.play(self.double, self.address);
        beyond.play(self.double, self.address + BYTES - 4);
        self.ask()
    }

    fn ask(&mut self) -> Result<()> {
        // SAFETY: memory that outlives the calls.
        let grad = || unsafe { RawGrad::new(self.address, NUMEL, Dtype::F32) };
        // So that the next one is not the list of last time.
        self.clipper.total_norm(&[grad().not_looked_up()], NormType::L2)?;
        self.clipper.total_norm(&[grad()], NormType::L2).map(drop)
    }
}

/// Runs `body` with a gradient in the middle of a large block.
fn with_gradient(body: impl FnOnce(&mut Bench<'_>)) {
    let Some(double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let memory = stream.alloc_zeros::<f32>(4096).unwrap();
    let address = memory.device_ptr(&stream).0 + 8192;
    let clipper = Clipper::new(&stream).unwrap();
    double.set_kernels_run(false); // only whether a call is refused matters
    body(&mut Bench { double: &double, clipper, address });
}

#[test]
fn memory_that_holds_a_gradient_is_taken_however_it_is_described() {
    with_gradient(|bench| {
        let valid = [
            ALLOCATED,
            Says { range: Range::Around, ..ALLOCATED },
            Says { kind: Some(UNIFIED), ..ALLOCATED },
            OF_A_POOL,
            Says { range: Range::Around, ..OF_A_POOL },
            Says { range: Range::Unanswered, ..OF_A_POOL },
            Says { range: Range::Before, ..OF_A_POOL },
            Says { kind: None, ..OF_A_POOL },
            Says { kind: None, mapped: false, device: None, range: Range::Unanswered, ..OF_A_POOL },
            Says { pool: false, ..OF_A_POOL }, // imported from another process
            VIRTUAL,
            Says { range: Range::Short, ..VIRTUAL }, // and on in the reserved range after it
            MANAGED,
            Says { kind: Some(HOST), device: Some(-1), ..MANAGED },
            Says { device: Some(-2), range: Range::Unanswered, ..MANAGED },
            Says { device: Some(1), context: false, ..MANAGED }, // last used on another device
            Says { mapped: false, ..ALLOCATED },
            Says { device: None, ..ALLOCATED },
            Says { kind: Some(77), ..ALLOCATED }, // a type that is new in a later driver
        ];
        for says in valid {
            assert_eq!(bench.check(says, VIRTUAL), Ok(()), "{says:?}");
        }
    });
}

/// All answers with all others, by the proofs that they are.
#[test]
fn an_answer_refuses_a_gradient_exactly_if_it_proves_it_bad() {
    use Range::*;
    with_gradient(|bench| {
        let (mut taken, mut refused) = (0, 0);
        let mut check = |says: Says, beyond: Says| {
            let mut proofs = says.proofs();
            let one_allocation = says.context || says.pool;
            let other_allocation = beyond.context || beyond.pool || beyond.managed;
            if says.range == Short && (one_allocation || other_allocation || !beyond.proofs().is_empty()) {
                proofs.push("followed by 12 bytes");
            }
            match bench.check(says, beyond) {
                Ok(()) => {
                    assert!(proofs.is_empty(), "taken, although {proofs:?}: {says:?}, beyond {beyond:?}");
                    taken += 1;
                }
                Err(error @ Error::BadPointer { tensor: 0, .. }) => {
                    let text = error.to_string();
                    assert!(proofs.iter().any(|proof| text.contains(proof)), "{text}: {says:?}, beyond {beyond:?}");
                    refused += 1;
                }
                Err(other) => panic!("{other}: {says:?}"),
            }
        };
        let flags = [false, true];
        for kind in [None, Some(HOST), Some(DEVICE), Some(ARRAY), Some(UNIFIED), Some(77)] {
            for device in [None, Some(-2), Some(-1), Some(0), Some(1)] {
                for (managed, mapped) in flags.map(|managed| flags.map(|mapped| (managed, mapped))).concat() {
                    for (context, pool) in [(false, false), (true, false), (false, true)] {
                        for range in [Unanswered, OnlyStart, OnlySize, Exact, Around, Before, After] {
                            check(Says { kind, device, managed, mapped, range, context, pool }, UNKNOWN);
                        }
                        let elsewhere = Says { device: Some(1), ..VIRTUAL };
                        for beyond in [UNKNOWN, VIRTUAL, elsewhere, ALLOCATED, OF_A_POOL, MANAGED] {
                            check(Says { kind, device, managed, mapped, range: Short, context, pool }, beyond);
                        }
                    }
                }
            }
        }
        assert_eq!(taken + refused, 6 * 5 * 4 * 3 * 13);
        assert!(taken > 1000 && refused > 1000, "{taken} {refused}");
    });
}

/// A driver that does not take the question proves nothing. One that reports an earlier failure is heard.
#[test]
fn a_question_that_the_driver_refuses() {
    with_gradient(|bench| {
        let mut ask = |index, code| {
            Says { range: Range::Short, ..VIRTUAL }.play(bench.double, bench.address);
            UNKNOWN.play(bench.double, bench.address + BYTES - 4);
            bench.double.fail_named("cuPointerGetAttributes", index, code);
            bench.ask()
        };
        let (no_answer, failures) = ([1, 101, 201, 801], [4, 700, 719, 999]);
        for index in [0, 1] {
            for code in no_answer {
                assert_eq!(ask(index, code), Ok(()), "{index} {code}");
            }
            for code in failures {
                let error = ask(index, code).unwrap_err();
                assert!(matches!(error, Error::Driver { op: "cuPointerGetAttributes", .. }), "{error}");
            }
        }
        let all = 2 * (no_answer.len() + failures.len()) as i32;
        assert_eq!(bench.double.failures_delivered(), all);
    });
}

//! The driver double: a libcuda of our own, loaded before cudarc looks for one. The other half is in
//! `tests/double/driver`, and `tests/double/README.md` says what it notices and what it does not simulate.

use std::ffi::{c_char, c_int, CStr, CString, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result};
use libloading::os::unix::{Library, Symbol, RTLD_GLOBAL, RTLD_NOW};

use super::toolchain::{self, Build, Compiler};

/// Counted since the last reset. Calls are counted when they are made, also those that are captured or fail.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Any cu* function but cuGetErrorName and cuGetErrorString.
    pub calls: u64,
    pub launches: u64,
    pub kernels_run: u64,
    pub graph_launches: u64,
    pub htod_calls: u64,
    pub htod_bytes: u64,
    pub dtoh_calls: u64,
    pub dtoh_bytes: u64,
    pub dtod_calls: u64,
    pub dtod_bytes: u64,
    pub memset_calls: u64,
    pub memset_bytes: u64,
    pub allocs: u64,
    pub frees: u64,
    pub alloc_bytes: u64,
    pub pinned_allocs: u64,
    pub pinned_frees: u64,
    /// Anything that makes the host wait: synchronise calls, synchronous copies, copies to pageable memory, frees that
    /// are not asynchronous.
    pub syncs: u64,
    pub event_records: u64,
    pub event_waits: u64,
    pub module_loads: u64,
    pub graph_instantiations: u64,
    /// Accesses outside live allocations.
    pub faults: u64,
}

/// A kernel that has run, and the bytes of gradients that it moved. Partials, descriptors and reports are not counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelRun {
    pub symbol: String,
    /// Read past L1.
    pub read: u64,
    /// Asked of L1, in packs that overlap: memory gives each of their bytes once.
    pub read_shared: u64,
    pub written: u64,
}

/// A kernel the double was built with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub symbol: String,
    pub threads: u32,
    pub param_bytes: u32,
}

/// The double, for one test at a time, as in a new process. Drop everything of CUDA's before it.
pub struct Double {
    library: &'static Library,
    _one_at_a_time: MutexGuard<'static, ()>,
}

/// The double, reset. None, with the reason printed, where it cannot be built.
pub fn lock() -> Option<Double> {
    lock_without(&[])
}

/// The double without some of its symbols, as an old driver lacks them. A process has one driver: all its tests have to
/// ask for the same.
pub fn lock_without(symbols: &'static [&'static str]) -> Option<Double> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    // A test that failed has poisoned the lock; the reset below undoes whatever it left.
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let library = library(symbols)?;
    let double = Double { library, _one_at_a_time: guard };
    double.reset();
    Some(double)
}

fn library(without: &'static [&'static str]) -> Option<&'static Library> {
    static LIBRARY: OnceLock<(&[&str], Option<Library>)> = OnceLock::new();
    let (built_without, library) = LIBRARY.get_or_init(|| (without, find(without)));
    assert_eq!(*built_without, without, "the driver of this process was loaded before, with other symbols left out");
    library.as_ref()
}

fn find(without: &[&str]) -> Option<Library> {
    if !cfg!(target_os = "linux") {
        toolchain::skip("the driver double needs Linux");
        return None;
    }
    let Some(compiler) = toolchain::compiler() else {
        toolchain::skip("no C++ compiler was found ($CXX, c++, g++, clang++)");
        return None;
    };
    Some(load(compiler, without).expect("the driver double builds and loads"))
}

/// Where the library is, and the other name that programs ask for. Built if it is not there yet.
pub fn build(compiler: &Compiler, without: &[&str]) -> Result<[PathBuf; 2]> {
    let flags = ["-O2", "-fPIC", "-fvisibility=hidden"];
    let soname = |name: &str| OsString::from(format!("-Wl,-soname,{name}"));
    let double = compiler.build(&Build {
        file_name: "libcuda.so",
        // The slowest first: they are compiled in parallel.
        sources: &[
            "libcuda.cpp",
            "kernels.cpp",
            "variant_kernels.cpp",
            "toy_kernels.cpp",
            "example_kernels.cpp",
            "bench_kernels.cpp",
            "host_kernels.cpp",
            "block.cpp",
            "fibers.cpp",
        ],
        compile_flags: &flags,
        link_flags: &["-shared".into(), soname("libcuda.so"), toolchain::hide_symbols(without)?],
    })?;
    // Programs ask for libcuda.so or libcuda.so.1; the loader compares sonames.
    let alias = alias(compiler, "libcuda.so.1", &double)?;
    Ok([double, alias])
}

/// An empty library of another name that depends on the double, so a symbol looked up in it is found there.
fn alias(compiler: &Compiler, name: &'static str, double: &Path) -> Result<PathBuf> {
    let soname = format!("-Wl,-soname,{name}").into();
    compiler.build(&Build {
        file_name: name,
        sources: &["driver/alias.cpp"],
        compile_flags: &["-O2", "-fPIC", "-fvisibility=hidden"],
        link_flags: &["-shared".into(), soname, "-Wl,--no-as-needed".into(), double.into()],
    })
}

fn load(compiler: &Compiler, without: &[&str]) -> Result<Library> {
    let [double, alias] = build(compiler, without)?;
    // SAFETY: our own libraries; their initialisers only fill tables.
    let library = unsafe { Library::open(Some(&double), RTLD_NOW | RTLD_GLOBAL) }
        .with_context(|| format!("opening {}", double.display()))?;
    // SAFETY: as above.
    let alias = unsafe { Library::open(Some(&alias), RTLD_NOW | RTLD_GLOBAL) }
        .with_context(|| format!("opening {}", alias.display()))?;
    std::mem::forget(alias); // stays for the process, as `library` does
    Ok(library)
}

impl Double {
    fn function<F>(&self, name: &str) -> Symbol<F> {
        // SAFETY: every caller names a function of tests/double/driver/control.h with the type it has there.
        unsafe { self.library.get(name.as_bytes()) }.expect("the double exports its controls")
    }

    fn call<R>(&self, name: &str) -> R {
        let function = self.function::<unsafe extern "C" fn() -> R>(name);
        // SAFETY: see `function`; takes no arguments.
        unsafe { function() }
    }

    fn set<A>(&self, name: &str, value: A) {
        let function = self.function::<unsafe extern "C" fn(A)>(name);
        // SAFETY: see `function`; takes one argument by value.
        unsafe { function(value) }
    }

    /// From now on the double is NCCL too.
    pub fn be_nccl(&self) {
        static LOADED: OnceLock<()> = OnceLock::new();
        LOADED.get_or_init(|| {
            let compiler = toolchain::compiler().expect("the double was built");
            let [double, _] = build(compiler, &[]).expect("it was built before");
            let path = alias(compiler, "libnccl.so", &double).expect("an empty library builds");
            // SAFETY: our own library; its initialisers only fill tables.
            let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.expect("it loads");
            std::mem::forget(library); // stays for the process
        });
    }

    /// Everything as in a new process: memory freed, handles invalid, counters and settings at their defaults.
    pub fn reset(&self) {
        self.call::<()>("double_reset");
    }

    pub fn reset_counters(&self) {
        self.call::<()>("double_reset_counters");
    }

    pub fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        self.set("double_get_counters", &raw mut counters);
        counters
    }

    /// The names of the driver calls since the last reset.
    pub fn log(&self) -> Vec<String> {
        let name = self.function::<unsafe extern "C" fn(u64) -> *const c_char>("double_log_name");
        (0..self.call::<u64>("double_log_size"))
            // SAFETY: the index is below the size, and the names are string literals.
            .map(|index| unsafe { CStr::from_ptr(name(index)) }.to_string_lossy().into_owned())
            .collect()
    }

    /// What has run since the last reset, in order.
    pub fn kernel_runs(&self) -> Vec<KernelRun> {
        #[repr(C)]
        struct Run {
            symbol: *const c_char,
            bytes: [u64; 3],
        }
        let get = self.function::<unsafe extern "C" fn(u64, *mut Run) -> c_int>("double_get_run");
        let mut runs = Vec::new();
        loop {
            let mut run = Run { symbol: std::ptr::null(), bytes: [0; 3] };
            // SAFETY: see `function`; the pointer is to a local of the type that control.h has.
            if unsafe { get(runs.len() as u64, &mut run) } == 0 {
                return runs;
            }
            let [read, read_shared, written] = run.bytes;
            // SAFETY: a string literal of the library.
            let symbol = unsafe { CStr::from_ptr(run.symbol) }.to_string_lossy().into_owned();
            runs.push(KernelRun { symbol, read, read_shared, written });
        }
    }

    /// The n-th driver call from now (0: the next) returns `code` and does nothing.
    pub fn fail(&self, call_index: u64, code: c_int) {
        let function = self.function::<unsafe extern "C" fn(u64, c_int)>("double_fail");
        // SAFETY: see `function`.
        unsafe { function(call_index, code) }
    }

    /// That call and all after it: a lost device.
    pub fn fail_from(&self, call_index: u64, code: c_int) {
        let function = self.function::<unsafe extern "C" fn(u64, c_int)>("double_fail_from");
        // SAFETY: see `function`.
        unsafe { function(call_index, code) }
    }

    /// The n-th call of the function of that name.
    pub fn fail_named(&self, name: &str, call_index: u64, code: c_int) {
        let name = CString::new(name).expect("a function name");
        let function = self.function::<unsafe extern "C" fn(*const c_char, u64, c_int)>("double_fail_named");
        // SAFETY: see `function`; the name is copied.
        unsafe { function(name.as_ptr(), call_index, code) }
    }

    /// Running the n-th kernel from now breaks its context with `code`: reported by a later call, and by all after it.
    pub fn crash_kernel(&self, launch_index: u64, code: c_int) {
        let function = self.function::<unsafe extern "C" fn(u64, c_int)>("double_crash_kernel");
        // SAFETY: see `function`.
        unsafe { function(launch_index, code) }
    }

    /// What the driver says of this address from now on: a value for the attribute (a number of
    /// `CUpointer_attribute`), or a code instead, which in a question about several attributes leaves the default value.
    pub fn answer(&self, address: u64, attribute: c_int, answer: Result<u64, c_int>) {
        let function = self.function::<unsafe extern "C" fn(u64, c_int, c_int, u64)>("double_answer");
        let (code, value) = answer.map_or_else(|code| (code, 0), |value| (0, value));
        // SAFETY: see `function`.
        unsafe { function(address, attribute, code, value) }
    }

    /// Injected failures and crashes that have happened.
    pub fn failures_delivered(&self) -> i32 {
        self.call("double_failures_delivered")
    }

    /// 0 to 2; 2 after a reset.
    pub fn set_device_count(&self, count: i32) {
        self.set("double_set_device_count", count);
    }

    /// 12080 for 12.8; 13000 after a reset. Decides which PTX versions are taken.
    pub fn set_driver_version(&self, version: i32) {
        self.set("double_set_driver_version", version);
    }

    /// 9.0 after a reset.
    pub fn set_compute_capability(&self, major: i32, minor: i32) {
        let function = self.function::<unsafe extern "C" fn(c_int, c_int)>("double_set_compute_capability");
        // SAFETY: see `function`.
        unsafe { function(major, minor) }
    }

    /// 4 after a reset.
    pub fn set_multiprocessors(&self, count: i32) {
        self.set("double_set_multiprocessors", count);
    }

    /// Whether the devices have memory pools (cuMemAllocAsync). Yes after a reset.
    pub fn set_memory_pools(&self, supported: bool) {
        self.set("double_set_memory_pools", c_int::from(supported));
    }

    /// Of each device; 8 GiB after a reset.
    pub fn set_total_memory(&self, bytes: u64) {
        self.set("double_set_total_memory", bytes);
    }

    /// Threads and blocks run in reversed order.
    pub fn set_reversed_order(&self, reversed: bool) {
        self.set("double_set_order", c_int::from(reversed));
    }

    /// Asynchronous work is queued until the host waits for it.
    pub fn set_deferred(&self, deferred: bool) {
        self.set("double_set_deferred", c_int::from(deferred));
    }

    /// Whether launches do anything. Where not, they are checked and counted all the same.
    pub fn set_kernels_run(&self, run: bool) {
        self.set("double_set_kernels_run", c_int::from(run));
    }

    /// Pieces of work queued and not run.
    pub fn pending_work(&self) -> u64 {
        self.call("double_pending_work")
    }

    /// Guard zones and freed blocks that were written to since the reset. Which, is on stderr.
    pub fn violated_guards(&self) -> u64 {
        self.call("double_check_guards")
    }

    /// Device and pinned allocations that nobody has freed.
    pub fn live_allocations(&self) -> u64 {
        self.call("double_live_allocations")
    }

    pub fn live_bytes(&self) -> u64 {
        self.call("double_live_bytes")
    }

    /// Streams, events, modules, graphs, and contexts retained.
    pub fn live_handles(&self) -> u64 {
        self.call("double_live_handles")
    }

    pub fn kernels(&self) -> Vec<Kernel> {
        type Get = unsafe extern "C" fn(u64, *mut *const c_char, *mut u32, *mut u32) -> c_int;
        let get = self.function::<Get>("double_kernel");
        let mut kernels = Vec::new();
        loop {
            let (mut symbol, mut threads, mut param_bytes) = (std::ptr::null(), 0, 0);
            // SAFETY: see `function`; the pointers are to locals.
            let found = unsafe { get(kernels.len() as u64, &mut symbol, &mut threads, &mut param_bytes) };
            if found == 0 {
                return kernels;
            }
            kernels.push(Kernel {
                // SAFETY: a string literal of the library.
                symbol: unsafe { CStr::from_ptr(symbol) }.to_string_lossy().into_owned(),
                threads,
                param_bytes,
            });
        }
    }
}

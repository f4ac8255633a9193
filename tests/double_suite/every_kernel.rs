//! That what the sanitizers run on a GPU, `suite::every_kernel`, launches every kernel of the crate.

use crate::suite::every_kernel;
use crate::support::double;
use gradclip::cuda::{self, Clipper};
use std::collections::BTreeSet;
use std::path::Path;

/// The symbols of the PTX that is shipped.
fn symbols() -> BTreeSet<String> {
    let prebuilt = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/prebuilt");
    let files = std::fs::read_dir(prebuilt).unwrap().map(|entry| entry.unwrap().path());
    let texts = files.filter(|path| path.extension().is_some_and(|extension| extension == "ptx"));
    let symbols_of = |ptx: String| {
        let names = ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry "));
        names.map(|name| name.trim_end_matches(['(', ')']).to_owned()).collect::<Vec<_>>()
    };
    texts.flat_map(|path| symbols_of(std::fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn no_kernel_is_left_out() {
    let Some(double) = double::lock() else { return };
    let all = symbols();
    assert!(all.len() >= 31 && all.contains("norm_partials_l2"), "{all:?}");
    let context = cuda::context(0).unwrap();
    every_kernel::run_all(&mut Clipper::new(&context.default_stream()).unwrap());
    let launched: BTreeSet<String> = double.kernel_runs().into_iter().map(|run| run.symbol).collect();
    let left_out: Vec<_> = all.difference(&launched).collect();
    assert!(left_out.is_empty(), "suite::every_kernel launches no {left_out:?}");
    // The sanitizers slow each launch down a hundredfold, and each module load.
    let counters = double.counters();
    assert!(counters.launches < 200, "{} launches are many for a sanitizer", counters.launches);
}

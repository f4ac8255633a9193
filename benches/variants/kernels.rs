//! The kernels of `variants.json`: PTX of the crate or of this folder, one entry of it, and what is replaced in its text.
//! Twin: `scripts/variants.py`.

use anyhow::{ensure, Context, Result};
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::Arc;

/// PTX by its stem.
pub type Texts = &'static [(&'static str, &'static str)];

/// The crate's snapshot.
const CRATE: Texts = &[
    ("clamp", include_str!("../../kernels/prebuilt/clamp.ptx")),
    ("clip_coef", include_str!("../../kernels/prebuilt/clip_coef.ptx")),
    ("norm_partials", include_str!("../../kernels/prebuilt/norm_partials.ptx")),
    ("scale", include_str!("../../kernels/prebuilt/scale.ptx")),
    ("scoped_stats", include_str!("../../kernels/prebuilt/scoped_stats.ptx")),
];

/// What is beside this file. Not in a program that does not ask for it: 3 MB.
pub const VARIANTS: Texts = &[
    ("cooperative", include_str!("cooperative.ptx")),
    ("last_block", include_str!("last_block.ptx")),
    ("norm_async", include_str!("norm_async.ptx")),
    ("norm_keep_end", include_str!("norm_keep_end.ptx")),
    ("norm_loads", include_str!("norm_loads.ptx")),
    ("second_pass", include_str!("second_pass.ptx")),
    ("stats_loads_first", include_str!("stats_loads_first.ptx")),
    ("wide", include_str!("wide.ptx")),
];

#[derive(Deserialize)]
pub struct Described {
    pub kernels: Vec<Kernel>,
    pub changes: Vec<Change>,
}

#[derive(Deserialize)]
pub struct Kernel {
    pub name: String,
    ptx: String,
    entry: String,
    #[serde(default)]
    replace: Vec<(String, String)>,
}

/// A row of the predictions in `docs/performance.md`.
#[derive(Deserialize)]
pub struct Change {
    pub key: String,
    pub prediction: String,
}

pub fn described() -> Result<Described> {
    Ok(serde_json::from_str(include_str!("variants.json"))?)
}

impl Kernel {
    /// What is loaded, of the crate's PTX or of `more`.
    pub fn text(&self, more: Texts) -> Result<String> {
        let (_, whole) = CRATE.iter().chain(more).find(|(stem, _)| *stem == self.ptx).context("no such PTX")?;
        let mut text = only(whole, &self.entry)?;
        for (old, new) in &self.replace {
            ensure!(text.contains(old), "{}: there is no {old:?} in {}", self.name, self.ptx);
            text = text.replace(old, new);
        }
        Ok(text)
    }
}

/// What stands before the first entry, and this one: fewer kernels for the driver to compile.
fn only(text: &str, entry: &str) -> Result<String> {
    const ENTRY: &str = ".visible .entry ";
    let mut parts = text.split(ENTRY);
    let before = parts.next().unwrap_or_default();
    let mine = parts.find(|part| part.strip_prefix(entry).is_some_and(|rest| rest.starts_with('(')));
    Ok(format!("{before}{ENTRY}{}", mine.with_context(|| format!("no entry {entry}"))?))
}

/// The oldest compute capability that takes it, as 10 * major + minor.
fn target_of(text: &str) -> Option<i32> {
    text.lines().find_map(|line| line.strip_prefix(".target sm_")?.parse().ok())
}

/// Those that this GPU takes, by name; each was loaded when first asked for.
pub struct Kernels {
    context: Arc<CudaContext>,
    described: Vec<Kernel>,
    more: Texts,
    loaded: HashMap<String, CudaFunction>,
    capability: i32,
}

/// A kernel, or why there is none on this GPU.
pub type Found = std::result::Result<CudaFunction, String>;

impl Kernels {
    /// The crate's kernels, and the kernels whose PTX is in `more`.
    pub fn new(context: &Arc<CudaContext>, more: Texts) -> Result<Self> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let capability = context.attribute(MAJOR)? * 10 + context.attribute(MINOR)?;
        let described = described()?.kernels;
        Ok(Self { context: context.clone(), described, more, loaded: HashMap::new(), capability })
    }

    pub fn get(&mut self, name: &str) -> Result<Found> {
        if let Some(function) = self.loaded.get(name) {
            return Ok(Ok(function.clone()));
        }
        let kernel = self.described.iter().find(|kernel| kernel.name == name);
        let kernel = kernel.with_context(|| format!("variants.json has no kernel {name}"))?;
        let text = kernel.text(self.more)?;
        let needed = target_of(&text).with_context(|| format!("{name} names no target"))?;
        if self.capability < needed {
            let version = |number: i32| format!("{}.{}", number / 10, number % 10);
            return Ok(Err(format!(
                "{name} needs compute capability {}, this GPU has {}",
                version(needed),
                version(self.capability)
            )));
        }
        // An old driver may refuse what a new one takes: a line that says so, as for an old GPU.
        let module = match self.context.load_module(Ptx::from_src(text)) {
            Ok(module) => module,
            Err(error) => return Ok(Err(format!("the driver does not take {name}: {error:?}"))),
        };
        let function = module.load_function(&kernel.entry)?;
        self.loaded.insert(name.to_owned(), function.clone());
        Ok(Ok(function))
    }
}

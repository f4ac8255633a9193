//! Embeds the kernels as PTX, for the feature `cuda`. docs: build/ptx.rs.

#[cfg(feature = "cuda")]
#[path = "build/ptx.rs"]
mod ptx;

#[cfg(feature = "cuda")]
fn main() -> anyhow::Result<()> {
    use anyhow::Context;
    use std::path::{Path, PathBuf};

    for path in ["build.rs", "build", "kernels"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let env = |name: &str| {
        // Editors and shells differ in PATH all the time, and PTX from elsewhere gives the same results: no rebuild.
        if name != "PATH" {
            println!("cargo:rerun-if-env-changed={name}");
        }
        std::env::var_os(name)
    };
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).context(format!("cargo did not set {name}"));
    let kernels = folder("CARGO_MANIFEST_DIR")?.join("kernels");
    let embedded = ptx::embed(&kernels, &folder("OUT_DIR")?, Path::new("/usr/local/cuda"), &env)?;
    if let Some(nvcc) = embedded.nvcc {
        println!("cargo:rerun-if-changed={}", nvcc.display());
    }
    if let Some(warning) = embedded.warning {
        println!("cargo:warning={warning}");
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
}

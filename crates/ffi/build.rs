//! Embeds the CUDA kernels that `scripts/kernels.sh` compiled. KAKEYA_KERNELS names their folder; without it the library
//! has no kernels, which needs no CUDA toolkit, and its CUDA functions say so.

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=KAKEYA_KERNELS");
    let mut code = String::new();
    match env::var_os("KAKEYA_KERNELS").filter(|value| !value.is_empty()) {
        Some(folder) => embed(Path::new(&folder), &mut code),
        None => code.push_str("pub const ARCHS: &str = \"\";\npub const IMAGES: [&[u8]; 0] = [];\n"),
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("images.rs"), code).expect("OUT_DIR can be written");
}

fn embed(folder: &Path, code: &mut String) {
    let folder = folder.canonicalize().unwrap_or_else(|error| {
        panic!("KAKEYA_KERNELS is {}: {error}; `make kernels` writes the kernels", folder.display())
    });
    println!("cargo::rerun-if-changed={}", folder.display());
    let archs = fs::read_to_string(folder.join("archs.txt"))
        .unwrap_or_else(|error| panic!("{}/archs.txt: {error}; `make kernels` writes it", folder.display()));
    let mut images: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| entry.expect("a folder's entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "fatbin"))
        .collect();
    images.sort();
    writeln!(code, "pub const ARCHS: &str = {:?};", archs.trim()).unwrap();
    writeln!(code, "pub const IMAGES: [&[u8]; {}] = [", images.len()).unwrap();
    for image in &images {
        println!("cargo::rerun-if-changed={}", image.display());
        // The driver reads the image's header in place: 16 is the alignment that it would have in an object file.
        writeln!(code, "    &Aligned(*include_bytes!({:?})).0,", image.display().to_string()).unwrap();
    }
    code.push_str("];\n#[repr(C, align(16))]\nstruct Aligned<T: ?Sized>(T);\n");
}

//! Writes csrc/include/kakeya.h.
//!
//! cbindgen puts all types of a crate before all functions. A book wants each type beside the
//! functions that take it, so every chapter is generated from its own files and they are put
//! together here, with the introduction in front.

use std::path::{Path, PathBuf};

/// Chapters in the order in which a caller meets them: title, and the files of src/ that make it.
const CHAPTERS: [(&str, &[&str]); 9] = [
    ("Status and errors", &["status.rs", "error.rs"]),
    ("Which library this is", &["version.rs"]),
    ("Recipes: what a page is made of", &["recipe.rs"]),
    ("Codec: a recipe made ready for a model", &["codec.rs", "layout.rs"]),
    ("Elements of tensors", &["dtype.rs"]),
    ("Seal and open: whole blocks", &["seal.rs", "open.rs"]),
    ("Write: the tokens of a step", &["write.rs"]),
    ("Attend: attention of a step", &["attend.rs"]),
    ("CUDA: a step on a GPU", &["cuda.rs"]),
];

/// Width of the rule above a chapter's title.
const WIDTH: usize = 100;

/// Where the committed header is.
pub fn path() -> PathBuf {
    crate_dir().join("../../csrc/include/kakeya.h")
}

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The whole header.
pub fn render() -> String {
    let introduction = crate_dir().join("header/introduction.txt");
    let mut out = std::fs::read_to_string(&introduction).expect("crates/ffi/header/introduction.txt");
    out.push_str(
        "\n/* clang-format off */\n\n#ifndef KAKEYA_H\n#define KAKEYA_H\n\n#include <stddef.h>\n#include <stdint.h>\n\n\
         #ifdef __cplusplus\nextern \"C\" {\n#endif\n",
    );
    for (number, (title, files)) in CHAPTERS.iter().enumerate() {
        let rule = "-".repeat(WIDTH - 6);
        out.push_str(&format!("\n/* {rule} */\n/* {}. {title} */\n", number + 1));
        for file in *files {
            out.push('\n');
            out.push_str(generate(file).trim());
            out.push('\n');
        }
    }
    out.push_str("\n#ifdef __cplusplus\n} /* extern \"C\" */\n#endif\n\n#endif /* KAKEYA_H */\n");
    out
}

/// What cbindgen makes of one file.
fn generate(file: &str) -> String {
    let config =
        cbindgen::Config::from_file(crate_dir().join("cbindgen.toml")).expect("crates/ffi/cbindgen.toml");
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(crate_dir().join("src").join(file))
        .generate()
        .unwrap_or_else(|error| panic!("cbindgen on src/{file}: {error}"));
    let mut text = Vec::new();
    bindings.write(&mut text);
    plain_enums(String::from_utf8(text).expect("cbindgen writes UTF-8"))
}

/// Turns cbindgen's sized enums, which read differently in C99, C23 and C++, into one form that all of
/// them read the same: `enum { .. };` and an integer type of the enum's name.
fn plain_enums(mut text: String) -> String {
    const C23: &str = "#if __STDC_VERSION__ >= 202311L\n";
    const END: &str = "#endif // __STDC_VERSION__ >= 202311L";
    for (name, integer) in [("kakeya_status", "int32_t"), ("kakeya_dtype", "uint32_t")] {
        let head = format!("enum {name}\n{C23}  : {integer}\n{END}\n {{");
        let tail = format!("{C23}typedef enum {name} {name};\n#else\ntypedef {integer} {name};\n{END}");
        text = text.replace(&head, "enum {").replace(&tail, &format!("typedef {integer} {name};"));
    }
    assert!(!text.contains("__STDC_VERSION__"), "an enum that plain_enums does not know:\n{text}");
    text
}

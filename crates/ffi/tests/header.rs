//! The committed header is the one that the sources give.

#[path = "support/header.rs"]
mod header;

const COMMAND: &str = "cargo run -p kakeya-ffi --example write_header";

#[test]
fn committed_header_is_current() {
    let path = header::path();
    let committed = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; write it with `{}`", path.display(), COMMAND));
    let rendered = header::render();
    let differs = committed.lines().zip(rendered.lines()).position(|(a, b)| a != b);
    let line = differs.unwrap_or_else(|| committed.lines().count().min(rendered.lines().count()));
    assert!(
        committed == rendered,
        "csrc/include/kakeya.h is stale from line {}; regenerate it with `{}`",
        line + 1,
        COMMAND
    );
}

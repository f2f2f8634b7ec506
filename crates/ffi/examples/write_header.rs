//! Regenerates csrc/include/kakeya.h: `cargo run -p kakeya-ffi --example write_header`.

#[path = "../tests/support/header.rs"]
mod header;

fn main() -> std::io::Result<()> {
    let path = header::path();
    std::fs::write(&path, header::render())?;
    println!("wrote {}", path.display());
    Ok(())
}

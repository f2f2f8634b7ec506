//! Every input that was kept, through its target: `fuzz/corpus` and `fuzz/crashes`.

use std::path::Path;

#[test]
fn kept_inputs_break_no_promise() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    for (name, target) in kakeya_fuzz::TARGETS {
        let mut count = 0;
        target(&[]);
        for kind in ["corpus", "crashes"] {
            let Ok(entries) = std::fs::read_dir(root.join(kind).join(name)) else { continue };
            for entry in entries {
                let path = entry.unwrap().path();
                println!("{}", path.display());
                target(&std::fs::read(&path).unwrap());
                count += 1;
            }
        }
        assert!(count > 0, "no inputs for {name} under {}", root.display());
    }
}

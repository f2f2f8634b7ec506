//! Every input that was kept, through its target: the corpora from which fuzzing starts and everything that was ever found.

use std::path::PathBuf;
use std::process::Command;

use kakeya_fuzz::TARGETS;

/// Runs the inputs of a target; returns how many there were.
fn replay(name: &str) -> usize {
    let (_, body) = TARGETS.iter().find(|(target, _)| *target == name).expect("a target");
    let mut count = 0;
    for kept in ["corpus", "crashes"] {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").join(kept).join(name);
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
        paths.sort();
        for path in paths {
            // The name of the input is the last line of the output when it fails.
            println!("{}", path.display());
            body(&std::fs::read(&path).expect("a readable file"));
            count += 1;
        }
    }
    count
}

macro_rules! targets {
    ($($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                assert!(replay(stringify!($name)) > 0, "a corpus is missing");
            }
        )*

        #[test]
        fn no_target_is_left_out() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

targets!(recipe, calibration, page, abi, scalar_simd, device);

/// The instruction set is chosen once a process: smaller ones take processes of their own.
#[test]
fn smaller_instruction_sets() {
    let test = std::env::current_exe().expect("a test knows its own path");
    for level in ["portable", "avx2"] {
        for target in ["scalar_simd", "page"] {
            let run = Command::new(&test).args(["--exact", target]).env("KAKEYA_SIMD", level).output();
            let run = run.expect("a test runs itself");
            let text = String::from_utf8_lossy(&run.stdout);
            assert!(run.status.success() && text.contains("1 passed"), "{level} {target}: {text}");
        }
    }
}

//! Every exported function runs behind the panic boundary: its whole body is one call of a function of `src/panic.rs`, or of
//! `launch`, whose own body is. So no statement of an entry point can unwind into C.

use std::collections::BTreeMap;
use std::path::PathBuf;

use syn::{Expr, Item, ItemFn, ReturnType, Stmt};

/// What an entry point's body may be a call of, and what it then returns.
const BOUNDARIES: [(&str, &str); 5] = [
    ("boundary", "kakeya_status"),
    ("launch", "kakeya_status"),
    ("release", ""),
    ("text_or_empty", "*const c_char"),
    ("number", "u32"),
];

/// The functions of `src/*.rs`, by their names.
fn functions() -> Vec<(String, ItemFn)> {
    let src = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&src).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for item in file.items {
            if let Item::Fn(function) = item {
                found.push((function.sig.ident.to_string(), function));
            }
        }
    }
    found
}

fn exported(function: &ItemFn) -> bool {
    // `#[unsafe(no_mangle)]` or `#[no_mangle]`.
    function.attrs.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) => {
            list.path.is_ident("unsafe") && list.tokens.to_string().contains("no_mangle")
        }
        other => other.path().is_ident("no_mangle"),
    })
}

/// The function that the only expression of a block calls; looks through one `unsafe` block.
fn called(block: &syn::Block) -> Option<String> {
    let [Stmt::Expr(expression, _)] = block.stmts.as_slice() else { return None };
    match expression {
        Expr::Unsafe(inner) => called(&inner.block),
        Expr::Call(call) => match &*call.func {
            Expr::Path(path) => path.path.get_ident().map(ToString::to_string),
            _ => None,
        },
        _ => None,
    }
}

fn returned(function: &ItemFn) -> String {
    match &function.sig.output {
        ReturnType::Default => String::new(),
        ReturnType::Type(_, of) => match &**of {
            syn::Type::Path(path) => path.path.segments.last().unwrap().ident.to_string(),
            syn::Type::Ptr(_) => "*const c_char".to_owned(),
            _ => "another type".to_owned(),
        },
    }
}

#[test]
fn every_entry_point_is_one_call_of_the_boundary() {
    let functions = functions();
    let boundaries: BTreeMap<_, _> = BOUNDARIES.into();
    let mut count = 0;
    for (name, function) in functions.iter().filter(|(_, function)| exported(function)) {
        let through = called(&function.block)
            .unwrap_or_else(|| panic!("{name}: the body is more than one call of src/panic.rs"));
        let returns = boundaries.get(through.as_str());
        assert_eq!(returns, Some(&returned(function).as_str()), "{name} calls {through}");
        assert!(function.sig.abi.is_some(), "{name} is exported without extern \"C\"");
        count += 1;
    }
    // The header is compared with the exports in tests/loaded.rs; this only shows that the scan finds them.
    let header = include_str!("../../../csrc/include/kakeya.h");
    let declared =
        header.lines().filter(|line| line.contains("kakeya_") && line.contains('(')).filter(|line| {
            line.starts_with("kakeya_status ")
                || line.starts_with("void ")
                || line.starts_with("const char *")
                || line.starts_with("uint32_t ")
        });
    assert_eq!(count, declared.count());

    let (_, launch) = functions.iter().find(|(name, _)| name == "launch").expect("src/launch.rs has it");
    assert_eq!(called(&launch.block).as_deref(), Some("boundary"));
}

/// Nothing is exported from inside a macro, a module or an impl, where the scan above would not see it.
#[test]
fn nothing_else_is_exported() {
    let src = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut attributes = 0;
    for entry in std::fs::read_dir(&src).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        attributes += text.matches("no_mangle").count() + text.matches("export_name").count();
    }
    assert_eq!(attributes, functions().iter().filter(|(_, function)| exported(function)).count());
}

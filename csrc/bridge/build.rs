fn main() {
    cxx_build::bridge("src/lib.rs")
        .file("src/bridge.cpp")
        .include("src")
        .include("../../kernels")
        .std("c++20")
        .flag("-Wall")
        .flag("-Wextra")
        // Products and sums must round one by one, as the codec's do.
        .flag("-ffp-contract=off")
        .compile("kakeya-bridge");
    for path in ["src/lib.rs", "src/bridge.cpp", "src/bridge.h", "../../kernels"] {
        println!("cargo::rerun-if-changed={path}");
    }
}

fn main() {
    cxx_build::bridge("src/lib.rs")
        .file("src/bridge.cpp")
        .include("src")
        .include("../../kernels")
        .std("c++20")
        .flag("-Wall")
        .flag("-Wextra")
        .compile("kakeya-bridge");
    for path in ["src/lib.rs", "src/bridge.cpp", "src/bridge.h", "../../kernels/unit.cuh"] {
        println!("cargo::rerun-if-changed={path}");
    }
}

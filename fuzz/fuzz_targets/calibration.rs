#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kakeya_fuzz::calibration(bytes));

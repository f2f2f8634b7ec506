//! The loaded library and what a caller needs around it.

use std::ffi::{CStr, c_char};
use std::path::PathBuf;
use std::ptr::null_mut;

use kakeya::kakeya_status::{self, *};
use kakeya::{kakeya_codec, kakeya_seal_args};

pub const HEADS: usize = 2;
pub const D: usize = 64;
const LAYERS: usize = 2;
pub const MODEL: &str = r#"{"num_layers":2,"num_kv_heads":2,"num_q_heads":4,"head_dim":64,"max_position":1024,
    "rope":{"rotary_dim":8,"interleaved":true,"inv_freq":[1.0,0.1,0.01,0.001]}}"#;

/// KAKEYA_LIBRARY, or where cargo put the shared library that it built with this test.
pub fn library_path() -> PathBuf {
    if let Some(chosen) = std::env::var_os("KAKEYA_LIBRARY").filter(|value| !value.is_empty()) {
        return chosen.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let deps = test.parent().expect("a test lies in target/<profile>/deps");
    // Building a test builds the library into deps/; `cargo build` copies it one folder up.
    let places = [deps.join("libkakeya.so"), deps.with_file_name("libkakeya.so")];
    places.iter().find(|path| path.is_file()).cloned().unwrap_or_else(|| {
        panic!("no libkakeya.so at {places:?}; build it with `cargo build -p kakeya-ffi` in the profile of this test")
    })
}

pub struct Library(libloading::Library);

impl Library {
    pub fn load() -> Self {
        let path = library_path();
        // SAFETY: the library runs no code when it is loaded or unloaded.
        Self(
            unsafe { libloading::Library::new(&path) }
                .unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        )
    }

    /// A function by its name.
    ///
    /// # Safety
    /// `F` is the signature that the header gives it; the result is not used after the library is gone.
    pub unsafe fn get<F: Copy>(&self, name: &str) -> F {
        // SAFETY: promised by the caller.
        *unsafe { self.0.get::<F>(name.as_bytes()) }.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn last_error(&self) -> String {
        // SAFETY: the signature is the one of the header.
        text(unsafe { self.get("kakeya_last_error") })
    }

    pub fn codec(&self, recipe: &str, calibration: &[u8]) -> Result<*mut kakeya_codec, kakeya_status> {
        self.codec_of_bytes(recipe.as_bytes(), MODEL.as_bytes(), calibration)
    }

    /// An empty calibration is none.
    pub fn codec_of_bytes(
        &self,
        recipe: &[u8],
        model: &[u8],
        calibration: &[u8],
    ) -> Result<*mut kakeya_codec, kakeya_status> {
        type New = unsafe extern "C" fn(
            *const c_char,
            usize,
            *const c_char,
            usize,
            *const u8,
            usize,
            *mut *mut kakeya_codec,
        ) -> kakeya_status;
        let mut codec = null_mut();
        let artefact = if calibration.is_empty() { std::ptr::null() } else { calibration.as_ptr() };
        // SAFETY: the signature is the one of the header; all slices live and are as long as said.
        let status = unsafe {
            self.get::<New>("kakeya_codec_new")(
                recipe.as_ptr().cast(),
                recipe.len(),
                model.as_ptr().cast(),
                model.len(),
                artefact,
                calibration.len(),
                &mut codec,
            )
        };
        if status == KAKEYA_OK { Ok(codec) } else { Err(status) }
    }

    pub fn free(&self, codec: *mut kakeya_codec) {
        // SAFETY: the signature is the one of the header; every test releases a codec once.
        unsafe { self.get::<unsafe extern "C" fn(*mut kakeya_codec)>("kakeya_codec_free")(codec) }
    }

    pub fn page_bytes(&self, codec: *const kakeya_codec) -> usize {
        type Ask = unsafe extern "C" fn(*const kakeya_codec, u32, *mut usize) -> kakeya_status;
        let mut bytes = 0;
        // SAFETY: the signature is the one of the header; the codec lives.
        assert_eq!(unsafe { self.get::<Ask>("kakeya_codec_page_bytes")(codec, 0, &mut bytes) }, KAKEYA_OK);
        bytes
    }

    /// What kakeya_codec_describe says of the static tables.
    pub fn fingerprint(&self, codec: *const kakeya_codec) -> String {
        type Describe =
            unsafe extern "C" fn(*const kakeya_codec, *mut c_char, usize, *mut usize) -> kakeya_status;
        let (mut text, mut needed) = (vec![0_u8; 1 << 16], 0);
        // SAFETY: the signature is the one of the header; codec and buffer live.
        let status = unsafe {
            self.get::<Describe>("kakeya_codec_describe")(
                codec,
                text.as_mut_ptr().cast(),
                text.len(),
                &mut needed,
            )
        };
        assert_eq!(status, KAKEYA_OK, "{}", self.last_error());
        let described: serde_json::Value = serde_json::from_slice(&text[..needed - 1]).unwrap();
        described["fingerprint"].as_str().unwrap().to_owned()
    }

    pub fn require_fingerprint(&self, codec: *const kakeya_codec, fingerprint: &str) -> kakeya_status {
        type Require = unsafe extern "C" fn(*const kakeya_codec, *const c_char, usize) -> kakeya_status;
        // SAFETY: the signature is the one of the header; codec and text live.
        unsafe {
            self.get::<Require>("kakeya_codec_require_fingerprint")(
                codec,
                fingerprint.as_ptr().cast(),
                fingerprint.len(),
            )
        }
    }

    /// The caller's args point to memory that lives.
    pub fn seal(&self, codec: *const kakeya_codec, args: &kakeya_seal_args) -> kakeya_status {
        type Seal = unsafe extern "C" fn(*const kakeya_codec, *const kakeya_seal_args) -> kakeya_status;
        // SAFETY: the signature is the one of the header; what args point to lives in the calling test.
        unsafe { self.get::<Seal>("kakeya_seal")(codec, args) }
    }

    pub fn open(
        &self,
        codec: *const kakeya_codec,
        layer: u32,
        head: u32,
        page: &[u8],
        k: &mut [f32],
        v: &mut [f32],
    ) -> kakeya_status {
        type Open = unsafe extern "C" fn(
            *const kakeya_codec,
            u32,
            u32,
            *const u8,
            usize,
            *mut f32,
            *mut f32,
            usize,
        ) -> kakeya_status;
        let open: Open =
            // SAFETY: the signature is the one of the header.
            unsafe { self.get("kakeya_open") };
        // SAFETY: all slices live and are as long as said.
        unsafe {
            open(
                codec,
                layer,
                head,
                page.as_ptr(),
                page.len(),
                k.as_mut_ptr(),
                v.as_mut_ptr(),
                k.len().min(v.len()),
            )
        }
    }
}

/// The text that a function without arguments returns.
pub fn text(function: extern "C" fn() -> *const c_char) -> String {
    // SAFETY: all functions of this signature return NUL-terminated text that lives until the next call.
    unsafe { CStr::from_ptr(function()) }.to_str().expect("texts are UTF-8").to_owned()
}

/// A 64-bit linear congruential generator (Knuth's MMIX constants), upper bits.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
}

/// Values in -2..2.
pub fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.next() as f32 / (1u32 << 30) as f32 - 2.0).collect()
}

/// A calibration artefact of the model, all means 0 and all variances 1.
pub fn artefact() -> Vec<u8> {
    let floats = LAYERS * HEADS * D;
    let tensors =
        [("k_mean", 0.0), ("k_var", 1.0), ("q_sq", 1.0), ("q_mean", 0.0), ("v_mean", 0.0), ("v_var", 1.0)];
    let mut header = serde_json::json!({"__metadata__": {"format": "kakeya-calibration-1"}});
    for (i, (name, _)) in tensors.iter().enumerate() {
        header[name] = serde_json::json!({
            "dtype": "F32",
            "shape": [LAYERS, HEADS, D],
            "data_offsets": [4 * i * floats, 4 * (i + 1) * floats],
        });
    }
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    for (_, value) in tensors {
        file.extend(f32::to_le_bytes(value).repeat(floats));
    }
    file
}

//! Many threads over the exported functions, called from Rust so that ThreadSanitizer sees both sides (`scripts/sanitize.sh
//! tsan`): a shared codec, codecs made and released meanwhile, codecs that change hands, a last error for each thread.

use std::ffi::CStr;
use std::ptr::{null, null_mut};
use std::sync::Barrier;

use kakeya::kakeya_status::*;
use kakeya::*;

const THREADS: usize = 8;
const D: usize = 64;
const BLOCK: usize = KAKEYA_BLOCK_TOKENS as usize;
const RECIPE: &str = "kakeya-free-4.6x";
const MODEL: &str =
    r#"{"num_layers":1,"num_kv_heads":1,"num_q_heads":1,"head_dim":64,"max_position":256,"rope":null}"#;

/// A codec's address, which may go to other threads: what the header promises is what is tested here.
#[derive(Clone, Copy)]
struct Shared(*mut kakeya_codec);
// SAFETY: the header allows every use of a codec from any thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new() -> Self {
        let (recipe, model) = (RECIPE.as_ptr().cast(), MODEL.as_ptr().cast());
        let mut codec = null_mut();
        // SAFETY: all texts live and are as long as said.
        let status =
            unsafe { kakeya_codec_new(recipe, RECIPE.len(), model, MODEL.len(), null(), 0, &mut codec) };
        assert_eq!(status, KAKEYA_OK);
        Self(codec)
    }

    /// Writes a block of this thread's own values into a page of its own, through the pool of threads.
    fn write(self, seed: usize) -> Vec<u8> {
        let rows: Vec<f32> =
            (0..BLOCK * D).map(|i| ((i * 31 + seed * 17) % 97) as f32 / 50.0 - 1.0).collect();
        let mut bytes = 0;
        // SAFETY: codec and size live.
        assert_eq!(unsafe { kakeya_codec_page_bytes(self.0, 0, &mut bytes) }, KAKEYA_OK);
        let mut page = vec![0; bytes];
        let slots: Vec<i64> = (0..BLOCK as i64).collect();
        let positions: Vec<i32> = (0..BLOCK as i32).collect();
        let args = kakeya_write_args {
            struct_size: size_of::<kakeya_write_args>() as u32,
            layer: 0,
            first_head: 0,
            num_heads: 1,
            dtype: 2,
            num_tokens: BLOCK as u32,
            num_blocks: 1,
            num_open: 0,
            k: rows.as_ptr().cast(),
            v: rows.as_ptr().cast(),
            k_token_stride: D as i64,
            k_head_stride: D as i64,
            v_token_stride: D as i64,
            v_head_stride: D as i64,
            slot_mapping: slots.as_ptr(),
            positions: positions.as_ptr(),
            pages: page.as_mut_ptr(),
            page_block_stride: bytes as i64,
            page_head_stride: bytes as i64,
            open_blocks: null_mut(),
            open_slot: null(),
        };
        // SAFETY: everything lives and is as long as said.
        assert_eq!(unsafe { kakeya_write(self.0, &args) }, KAKEYA_OK);
        page
    }

    /// A refusal that only this thread asks for.
    fn refuse(self, layer: u32) {
        let mut bytes = 0;
        // SAFETY: codec and size live.
        assert_eq!(unsafe { kakeya_codec_page_bytes(self.0, layer, &mut bytes) }, KAKEYA_ERR_OUT_OF_RANGE);
    }

    fn free(self) {
        // SAFETY: every codec here is released once, after the calls that use it.
        unsafe { kakeya_codec_free(self.0) }
    }
}

fn last_error() -> String {
    // SAFETY: never NULL, NUL-terminated, copied before the next call of this thread.
    unsafe { CStr::from_ptr(kakeya_last_error()) }.to_str().unwrap().to_owned()
}

#[test]
fn handles_are_shared_made_and_released_by_many_threads() {
    let shared = Shared::new();
    let alone: Vec<Vec<u8>> = (0..THREADS).map(|seed| shared.write(seed)).collect();
    let gate = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for (number, alone) in alone.iter().enumerate() {
            let (handed, gate) = (Shared::new(), &gate);
            scope.spawn(move || {
                gate.wait();
                assert_eq!(last_error(), "");
                for round in 0..3 {
                    let layer = 100 * (number as u32 + 1) + round;
                    shared.refuse(layer);
                    assert_eq!(&shared.write(number), alone);
                    let own = Shared::new();
                    assert_eq!(&own.write(number), alone);
                    own.free();
                    assert!(last_error().starts_with(&format!("layer is {layer};")), "{}", last_error());
                }
                assert_eq!(&handed.write(number), alone);
                handed.free();
            });
        }
    });
    assert_eq!(last_error(), "");
    shared.free();
}

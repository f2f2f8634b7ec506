//! Sequences of C ABI calls over memory that is there.
//!
//! Every array of a call lies in one arena of buffers that are larger than any call needs, so whatever the arguments say,
//! the library may believe it: sizes stay within what a buffer holds, or are so large that they must be refused. Fields
//! are then made wrong one by one: another struct_size, a NULL, an odd address, another array's address, a stride of any
//! size, ids and positions of any value. After a refusal the arena must be as it was; after success only what the call
//! writes may have changed.

use crate::input::Input;
use crate::models::{artefact, shape};
use kakeya::kakeya_status::{self, KAKEYA_ERR_PANIC, KAKEYA_OK};
use kakeya::{kakeya_attend_args, kakeya_codec, kakeya_seal_args, kakeya_write_args};
use std::ffi::{c_char, c_void};
use std::sync::OnceLock;

const HEADS: usize = 2;
const Q_HEADS: usize = 4;
const DIM: usize = 64;
const MAX_TOKENS: usize = 130;
const BLOCKS: usize = 5;
const OPEN: usize = 2;
const SEQS: usize = 3;
/// Bytes of a buffer: the open blocks in f32, the largest of all, and room for odd addresses and wider strides.
const SIZE: usize = OPEN * 2 * HEADS * 128 * DIM * 4 + 32768;

/// Buffers by use; their order is that of the arena.
#[derive(Clone, Copy)]
enum Buffer {
    K,
    V,
    Q,
    Out,
    Pages,
    Open,
    Lse,
    /// slot_mapping, positions, query_start, seq_lens, block_table and open_slot, a sixth each.
    Integers,
}
const BUFFERS: usize = 8;

/// The codecs of this target, made once. Handles stay for the process, as an engine's would.
fn codecs() -> &'static [usize] {
    static CODECS: OnceLock<Vec<usize>> = OnceLock::new();
    CODECS.get_or_init(|| {
        let s = shape(DIM);
        let freq: Vec<String> = s.rope.iter().flat_map(|r| &r.inv_freq).map(ToString::to_string).collect();
        let model = format!(
            r#"{{"num_layers":2,"num_kv_heads":{HEADS},"num_q_heads":{Q_HEADS},"head_dim":{DIM},"max_position":4096,
               "rope":{{"rotary_dim":{DIM},"interleaved":false,"inv_freq":[{}]}}}}"#,
            freq.join(",")
        );
        let bytes = artefact(&s, 7);
        ["kakeya-free-4.6x", "kakeya-4.6x", "kakeya-4.6x-trellis"]
            .iter()
            .map(|name| {
                let calibrated = !name.contains("free");
                let mut codec: *mut kakeya_codec = std::ptr::null_mut();
                // SAFETY: texts and bytes with their lengths, and a place for the handle.
                let status = unsafe {
                    kakeya::kakeya_codec_new(
                        name.as_ptr().cast::<c_char>(),
                        name.len(),
                        model.as_ptr().cast::<c_char>(),
                        model.len(),
                        if calibrated { bytes.as_ptr() } else { std::ptr::null() },
                        if calibrated { bytes.len() } else { 0 },
                        &raw mut codec,
                    )
                };
                assert_eq!(status, KAKEYA_OK);
                codec as usize
            })
            .collect()
    })
}

/// The memory of one sequence of calls.
struct Arena {
    /// u64 for the alignment of every element type.
    words: Vec<u64>,
    before: Vec<u64>,
}

impl Arena {
    fn new() -> Self {
        // 1 to 2 with either sign in bf16 and f16, and finite in f32.
        let word = |i: usize| 0x3c40_bc80_3cc0_bd00u64.rotate_left(16 * (i as u32 % 4)) ^ (i as u64 & 0x3f);
        let words: Vec<u64> = (0..BUFFERS * SIZE / 8).map(word).collect();
        Self { before: words.clone(), words }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = self.words.len() * 8;
        // SAFETY: the same memory as bytes, which have no alignment and no invalid values.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast::<u8>(), len) }
    }

    fn at(&mut self, buffer: Buffer) -> *mut u8 {
        self.bytes()[buffer as usize * SIZE..].as_mut_ptr()
    }

    /// Address of one of the six integer arrays.
    fn integers(&mut self, index: usize) -> *mut u8 {
        let part = SIZE / 6 / 8 * 8;
        self.bytes()[Buffer::Integers as usize * SIZE + index * part..].as_mut_ptr()
    }

    fn remember(&mut self) {
        self.before.copy_from_slice(&self.words);
    }

    /// What a call may have changed: nothing after a refusal, these buffers after success.
    fn check(&self, status: kakeya_status, outputs: &[Buffer]) {
        assert_ne!(status, KAKEYA_ERR_PANIC, "a panic was caught at the border");
        if status != KAKEYA_OK {
            assert!(self.words == self.before, "{status:?} after something was written");
            return;
        }
        for buffer in 0..BUFFERS {
            if outputs.iter().any(|o| *o as usize == buffer) {
                continue;
            }
            let part = buffer * SIZE / 8..(buffer + 1) * SIZE / 8;
            assert!(self.words[part.clone()] == self.before[part], "buffer {buffer} is no output");
        }
    }
}

/// A sequence of up to six calls.
pub fn abi(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let codec = *input.pick(codecs()) as *const kakeya_codec;
    let mut arena = Arena::new();
    for _ in 0..6 {
        if input.is_empty() {
            break;
        }
        match input.below(6) {
            0 => seal(codec, &mut arena, &mut input),
            1 | 2 => write(codec, &mut arena, &mut input),
            3 | 4 => attend(codec, &mut arena, &mut input),
            _ => open(codec, &mut arena, &mut input),
        }
        if input.rarely(3) {
            // A page, or a row, that is damaged.
            let at = usize::from(input.u16()) % (2 * SIZE);
            let value = input.byte();
            arena.bytes()[Buffer::Out as usize * SIZE + at] = value;
        }
    }
}

fn struct_size<T>(input: &mut Input) -> u32 {
    let right = size_of::<T>() as u32;
    if input.rarely(16) { *input.pick(&[0, right - 1, right + 8, u32::MAX]) } else { right }
}

/// A count up to `most`, seldom more than the model has.
fn count(input: &mut Input, most: usize) -> u32 {
    if input.rarely(12) { input.below(most + 3).min(most) as u32 } else { most as u32 }
}

/// A stride that is `right`, wider within the room of a buffer, or one that must be refused or is not used. None between:
/// memory of 2^62 bytes could be there for all that the library knows.
fn stride(input: &mut Input, right: usize) -> i64 {
    let right = right as i64;
    if !input.rarely(10) {
        return right;
    }
    *input.pick(&[right + 8, right + 16, 0, 1, -1, i64::MAX, i64::MIN])
}

/// `right`, or NULL, or an odd address, or another buffer's address.
fn pointer(input: &mut Input, arena: &mut Arena, right: *mut u8) -> *mut c_void {
    if !input.rarely(14) {
        return right.cast();
    }
    match input.below(3) {
        0 => std::ptr::null_mut(),
        1 => right.wrapping_add(1).cast(),
        _ => {
            let at = input.below(BUFFERS - 1) * SIZE;
            arena.bytes()[at..].as_mut_ptr().cast()
        }
    }
}

/// Puts integers into one of the six arrays: `right(i)`, some of them replaced by any value.
fn fill<T: Copy>(
    input: &mut Input,
    arena: &mut Arena,
    index: usize,
    len: usize,
    right: impl Fn(usize) -> T,
    any: impl Fn(u64) -> T,
) -> *mut u8 {
    let at = arena.integers(index);
    assert!(len * size_of::<T>() <= SIZE / 6 / 8 * 8);
    for i in 0..len {
        // SAFETY: inside the array, by the assertion; arrays begin at multiples of 8.
        unsafe { at.cast::<T>().add(i).write(right(i)) };
    }
    for _ in 0..2 {
        if len > 0 && input.rarely(8) {
            let (i, value) = (input.below(len), any(input.u64()));
            // SAFETY: as above.
            unsafe { at.cast::<T>().add(i).write(value) };
        }
    }
    at
}

fn layer(input: &mut Input) -> u32 {
    if input.rarely(16) { input.byte().into() } else { u32::from(input.byte() % 2) }
}

fn dtype(input: &mut Input) -> u32 {
    if input.rarely(16) { input.byte().into() } else { u32::from(input.byte() % 3) }
}

fn seal(codec: *const kakeya_codec, arena: &mut Arena, input: &mut Input) {
    let heads = count(input, HEADS);
    let args = kakeya_seal_args {
        struct_size: struct_size::<kakeya_seal_args>(input),
        layer: layer(input),
        first_head: u32::from(input.rarely(8)),
        num_heads: heads,
        dtype: dtype(input),
        block_index: input.u16().into(),
        k: {
            let at = arena.at(Buffer::K);
            pointer(input, arena, at)
        },
        v: {
            let at = arena.at(Buffer::V);
            pointer(input, arena, at)
        },
        k_token_stride: stride(input, HEADS * DIM),
        k_head_stride: stride(input, DIM),
        v_token_stride: stride(input, HEADS * DIM),
        v_head_stride: stride(input, DIM),
        pages: {
            let at = arena.at(Buffer::Pages);
            pointer(input, arena, at).cast()
        },
        page_head_stride: stride(input, 8192),
    };
    arena.remember();
    // SAFETY: any address in the arena has room for what the counts and strides say, up to the arena's end, or these are
    // so large that they are refused; the codec is never released.
    let status = unsafe { kakeya::kakeya_seal(codec, &raw const args) };
    arena.check(status, &aimed(arena, args.pages));
}

/// The buffer that an output's pointer names, and the one after it: an odd or borrowed address moves what is written.
fn aimed<T>(arena: &Arena, pointer: *const T) -> Vec<Buffer> {
    let all = [
        Buffer::K,
        Buffer::V,
        Buffer::Q,
        Buffer::Out,
        Buffer::Pages,
        Buffer::Open,
        Buffer::Lse,
        Buffer::Integers,
    ];
    let base = arena.words.as_ptr() as usize;
    let Some(offset) = (pointer as usize).checked_sub(base) else { return Vec::new() };
    all.into_iter().filter(|b| *b as usize == offset / SIZE).collect()
}

fn open(codec: *const kakeya_codec, arena: &mut Arena, input: &mut Input) {
    let (layer, head) = (layer(input), u32::from(input.byte() % 3));
    let page = {
        let at = arena.at(Buffer::Pages);
        pointer(input, arena, at).cast::<u8>()
    };
    let mut bytes = 0;
    // SAFETY: a codec that is never released, and a place for the size.
    let status = unsafe { kakeya::kakeya_codec_page_bytes(codec, 0, &raw mut bytes) };
    assert_eq!(status, KAKEYA_OK);
    let page_len = if input.rarely(6) { input.below(2 * bytes) } else { bytes };
    let len = if input.rarely(6) { input.below(9000) } else { 128 * DIM };
    let k = {
        let at = arena.at(Buffer::K);
        pointer(input, arena, at).cast::<f32>()
    };
    let v = {
        let at = arena.at(Buffer::V);
        pointer(input, arena, at).cast::<f32>()
    };
    arena.remember();
    // SAFETY: as in `seal`.
    let status = unsafe { kakeya::kakeya_open(codec, layer, head, page, page_len, k, v, len) };
    let mut outputs = aimed(arena, k);
    outputs.extend(aimed(arena, v));
    arena.check(status, &outputs);
}

/// Sequences of one step as an engine would have them: starts, lengths, blocks.
struct Step {
    starts: Vec<i32>,
    lens: Vec<i32>,
}

fn step(input: &mut Input) -> Step {
    let mut step = Step { starts: vec![0], lens: Vec::new() };
    for _ in 0..=input.below(SEQS) {
        let room = MAX_TOKENS as i32 - *step.starts.last().unwrap_or(&0);
        let count = (input.byte() as i32 % 131).min(room);
        let history = i32::from(input.byte());
        step.starts.push(step.starts.last().unwrap_or(&0) + count);
        step.lens.push(history + count);
    }
    step
}

fn write(codec: *const kakeya_codec, arena: &mut Arena, input: &mut Input) {
    let tokens = input.below(MAX_TOKENS + 1);
    let first = input.below(300);
    let block = input.below(BLOCKS);
    let slot = |i: usize| ((block + (first + i) / 128) % BLOCKS * 128 + (first + i) % 128) as i64;
    let slots = fill(input, arena, 0, tokens, slot, |x| x as i64 >> (x % 64));
    let positions = fill(input, arena, 1, tokens, |i| (first + i) as i32, |x| x as i32 >> (x % 32));
    let open_slot =
        fill(input, arena, 5, BLOCKS, |i| if i < OPEN { i as i32 } else { -1 }, |x| x as i32 >> (x % 32));
    let heads = count(input, HEADS);
    let args = kakeya_write_args {
        struct_size: struct_size::<kakeya_write_args>(input),
        layer: layer(input),
        first_head: u32::from(input.rarely(8)),
        num_heads: heads,
        dtype: dtype(input),
        num_tokens: tokens as u32,
        num_blocks: count(input, BLOCKS),
        num_open: if input.rarely(8) { 0 } else { OPEN as u32 },
        k: {
            let at = arena.at(Buffer::K);
            pointer(input, arena, at)
        },
        v: {
            let at = arena.at(Buffer::V);
            pointer(input, arena, at)
        },
        k_token_stride: stride(input, HEADS * DIM),
        k_head_stride: stride(input, DIM),
        v_token_stride: stride(input, HEADS * DIM),
        v_head_stride: stride(input, DIM),
        slot_mapping: pointer(input, arena, slots).cast(),
        positions: pointer(input, arena, positions).cast(),
        pages: {
            let at = arena.at(Buffer::Pages);
            pointer(input, arena, at).cast()
        },
        page_block_stride: stride(input, HEADS * 8192),
        page_head_stride: stride(input, 8192),
        open_blocks: {
            let at = arena.at(Buffer::Open);
            pointer(input, arena, at)
        },
        open_slot: pointer(input, arena, open_slot).cast(),
    };
    arena.remember();
    // SAFETY: as in `seal`.
    let status = unsafe { kakeya::kakeya_write(codec, &raw const args) };
    let mut outputs = aimed(arena, args.pages);
    outputs.extend(aimed(arena, args.open_blocks));
    arena.check(status, &outputs);
}

fn attend(codec: *const kakeya_codec, arena: &mut Arena, input: &mut Input) {
    let step = step(input);
    let (seqs, tokens) = (step.lens.len(), *step.starts.last().unwrap_or(&0));
    let starts = fill(input, arena, 2, seqs + 1, |i| step.starts[i], |x| x as i32 >> (x % 32));
    let lens = fill(input, arena, 3, seqs, |i| step.lens[i], |x| x as i32 >> (x % 32));
    let columns = 4;
    let table =
        fill(input, arena, 4, seqs * columns, |i| ((i * 3) % BLOCKS) as i32, |x| x as i32 >> (x % 32));
    let open_slot =
        fill(input, arena, 5, BLOCKS, |i| if i < OPEN { i as i32 } else { -1 }, |x| x as i32 >> (x % 32));
    let kv_heads = count(input, HEADS);
    let args = kakeya_attend_args {
        struct_size: struct_size::<kakeya_attend_args>(input),
        layer: layer(input),
        first_head: u32::from(input.rarely(8)),
        num_kv_heads: kv_heads,
        num_q_heads: if input.rarely(12) { input.byte().into() } else { 2 * kv_heads },
        dtype: dtype(input),
        num_seqs: if input.rarely(12) { input.below(seqs + 1) as u32 } else { seqs as u32 },
        num_tokens: tokens as u32,
        num_blocks: count(input, BLOCKS),
        num_open: if input.rarely(8) { 0 } else { OPEN as u32 },
        max_blocks_per_seq: if input.rarely(8) { input.below(columns + 1) as u32 } else { columns as u32 },
        flags: if input.rarely(12) { input.byte().into() } else { u32::from(input.byte() % 2) },
        scale: if input.rarely(12) { f32::from_bits(input.u64() as u32) } else { 0.125 },
        q: {
            let at = arena.at(Buffer::Q);
            pointer(input, arena, at)
        },
        k: {
            let at = arena.at(Buffer::K);
            pointer(input, arena, at)
        },
        v: {
            let at = arena.at(Buffer::V);
            pointer(input, arena, at)
        },
        q_token_stride: stride(input, Q_HEADS * DIM),
        q_head_stride: stride(input, DIM),
        k_token_stride: stride(input, HEADS * DIM),
        k_head_stride: stride(input, DIM),
        v_token_stride: stride(input, HEADS * DIM),
        v_head_stride: stride(input, DIM),
        out: {
            let at = arena.at(Buffer::Out);
            pointer(input, arena, at)
        },
        out_token_stride: stride(input, Q_HEADS * DIM),
        out_head_stride: stride(input, DIM),
        query_start: pointer(input, arena, starts).cast(),
        seq_lens: pointer(input, arena, lens).cast(),
        block_table: pointer(input, arena, table).cast(),
        block_table_stride: stride(input, columns),
        pages: {
            let at = arena.at(Buffer::Pages);
            pointer(input, arena, at).cast()
        },
        page_block_stride: stride(input, HEADS * 8192),
        page_head_stride: stride(input, 8192),
        open_blocks: {
            let at = arena.at(Buffer::Open);
            pointer(input, arena, at)
        },
        open_slot: pointer(input, arena, open_slot).cast(),
        lse: if input.rarely(3) {
            let at = arena.at(Buffer::Lse);
            pointer(input, arena, at).cast()
        } else {
            std::ptr::null_mut()
        },
    };
    arena.remember();
    // SAFETY: as in `seal`.
    let status = unsafe { kakeya::kakeya_attend(codec, &raw const args) };
    let mut outputs = aimed(arena, args.out);
    outputs.extend(aimed(arena, args.lse));
    arena.check(status, &outputs);
}

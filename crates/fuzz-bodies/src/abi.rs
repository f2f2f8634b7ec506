//! Target `abi`: a sequence of calls of the C ABI over memory that really exists, with arguments from right to absurd.
//!
//! All arrays lie in one arena, so that they may overlap, end where others begin, or be misaligned. Each call must return a
//! status other than KAKEYA_ERR_PANIC; an error leaves the whole arena as it was and a text in kakeya_last_error(); a
//! success changes nothing outside the call's outputs.
//!
//! What a caller must keep, and so does this one: a codec that is not released, and memory that is there. Calls whose
//! counts and strides reach past the arena's end are therefore left out, unless they reach past the end of any address space,
//! which the library must refuse. The CUDA functions are not called: without a device they refuse at once.

use std::ffi::{CStr, c_char, c_void};
use std::mem::size_of;
use std::ptr::null_mut;

use ::kakeya_codec::{ModelShape, Recipe};
use kakeya::kakeya_status::{self, *};
use kakeya::*;

use crate::common::{self, Noise};
use crate::source::Source;

/// Bytes of the arena, and of its parts when a call's arguments are those that its caller would give.
const ARENA: usize = 1 << 20;
const K: usize = 0;
const V: usize = 72 << 10;
const Q: usize = 144 << 10;
const OUT: usize = 288 << 10;
const LSE: usize = 432 << 10;
const SLOT_MAPPING: usize = 436 << 10;
const POSITIONS: usize = 438 << 10;
const QUERY_START: usize = 439 << 10;
const SEQ_LENS: usize = QUERY_START + 64;
const BLOCK_TABLE: usize = SEQ_LENS + 64;
const OPEN_SLOT: usize = BLOCK_TABLE + 128;
const SINKS: usize = OPEN_SLOT + 64;
const TEXT: usize = 440 << 10;
const PAGES: usize = 448 << 10;
const OPEN_BLOCKS: usize = 592 << 10;

const PARTS: [usize; 14] = [
    K,
    V,
    Q,
    OUT,
    LSE,
    SLOT_MAPPING,
    POSITIONS,
    QUERY_START,
    SEQ_LENS,
    BLOCK_TABLE,
    OPEN_SLOT,
    SINKS,
    TEXT,
    PAGES,
];

/// Calls of an input at most.
const CALLS: usize = 12;
/// Tokens of a step that fit the arena's parts.
const TOKENS: usize = 136;
/// Blocks and open blocks likewise, and sequences.
const BLOCKS: usize = 6;
const OPEN: usize = 2;
const SEQUENCES: usize = 3;

const RECIPES: [&str; 8] = [
    "kakeya-free-4.6x",
    "kakeya-free-6.4x-trellis",
    "kakeya-4.6x",
    "kakeya-5.3x-trellis",
    "kakeya-3.5x-lloyd-max",
    r#"{"base":"kakeya-free-4.6x","ratio":4.0,"quantizer":"trellis","min_slots":0,"menu":1}"#,
    r#"{"base":"kakeya-4.6x","ratio":99}"#,
    "",
];

const MODELS: [&str; 6] = [
    r#"{"num_layers":2,"num_kv_heads":2,"num_q_heads":4,"head_dim":64,"max_position":1024,
        "rope":{"rotary_dim":8,"interleaved":true,"inv_freq":[1.0,0.1,0.01,0.001]}}"#,
    r#"{"num_layers":2,"num_kv_heads":2,"num_q_heads":4,"head_dim":64,"max_position":1000,"rope":null}"#,
    r#"{"num_layers":1,"num_kv_heads":1,"num_q_heads":2,"head_dim":128,"max_position":1024,"rope":null}"#,
    r#"{"num_layers":1,"num_kv_heads":1,"num_q_heads":1,"head_dim":96,"max_position":512,
        "rope":{"rotary_dim":2,"interleaved":false,"inv_freq":[64]}}"#,
    r#"{"num_layers":4097,"num_kv_heads":1,"num_q_heads":1,"head_dim":64,"max_position":1,"rope":null}"#,
    r#"{"num_layers":1,"num_kv_heads":1,"num_q_heads":1,"head_dim":256,"max_position":300,"rope":null}"#,
];

/// See the top of this file.
pub fn abi(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let mut caller = Caller::new();
    // Most calls need a codec: one stands ready.
    caller.codec_new(&mut Source::new(&[source.u8() & 1, 0, 0, 0]));
    for _ in 0..CALLS {
        if source.is_empty() {
            break;
        }
        match source.below(12) {
            0 => caller.codec_new(&mut source),
            1 => caller.texts(&mut source),
            2 => caller.sizes(&mut source),
            3 => caller.fill(&mut source),
            4 => caller.indices(&mut source),
            5 => caller.seal(&mut source),
            6 => caller.open(&mut source),
            7 | 8 => caller.write(&mut source),
            9 => caller.attend(&mut source, false),
            10 => caller.attend(&mut source, true),
            _ => caller.free(&mut source),
        }
    }
}

/// A codec of the library and what its caller knows of it.
struct Handle {
    codec: *mut kakeya_codec,
    shape: ModelShape,
    page_bytes: usize,
}

/// An array of a call: its pointer, and how many bytes from there on the call may touch if it is not refused.
type Reach = (*const u8, u128);

struct Caller {
    // Words, for the alignment of all element types.
    arena: Box<[u64]>,
    before: Vec<u8>,
    handles: Vec<Handle>,
}

impl Drop for Caller {
    fn drop(&mut self) {
        for handle in self.handles.drain(..) {
            // SAFETY: it came from kakeya_codec_new and is released here only.
            unsafe { kakeya_codec_free(handle.codec) };
        }
    }
}

/// Bytes from a strided tensor's first element to its last; 0 if there is none. `None`: a stride is negative.
fn span(dims: [(u32, i64); 2], row: usize, element: usize) -> Option<u128> {
    let mut reach = 0u128;
    for (count, stride) in dims {
        let stride = u128::from(u64::try_from(stride).ok()?);
        if count == 0 {
            return Some(0);
        }
        reach += u128::from(count - 1) * stride;
    }
    Some((reach + row as u128) * element as u128)
}

/// Size of an element; of what is no dtype, which is refused, any.
fn element_bytes(dtype: u32) -> usize {
    if dtype < 2 { 2 } else { 4 }
}

/// A stride: mostly `right`, else beside it or beyond reason.
fn stride(source: &mut Source, right: usize) -> i64 {
    let right = right as i64;
    match source.u8() {
        0..216 => right,
        216 => 0,
        217 => 1,
        218 => right - 1,
        219 => right + 1,
        220 => 2 * right,
        221 => -1,
        222 => i64::MIN,
        223 => i64::MAX,
        224 => i64::MAX / 127,
        225 => right - 64,
        _ => i64::from(source.u16() as i16),
    }
}

/// A count or index: mostly `right`, else beside it, any small one or any at all.
fn number(source: &mut Source, right: usize) -> u32 {
    match source.u8() {
        0..200 => right as u32,
        200..210 => right as u32 + 1,
        210..220 => (right as u32).wrapping_sub(1),
        220..254 => u32::from(source.u8()),
        _ => source.u32(),
    }
}

/// sizeof a struct, or not.
fn struct_size<T>(source: &mut Source) -> u32 {
    match source.u8() {
        0..250 => size_of::<T>() as u32,
        _ => source.u32(),
    }
}

impl Caller {
    fn new() -> Caller {
        let arena = vec![0u64; ARENA / 8].into_boxed_slice();
        Caller { arena, before: vec![0; ARENA], handles: Vec::new() }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.arena.as_mut_ptr().cast::<u8>();
        // SAFETY: the arena's own memory, borrowed with it; bytes need no alignment.
        unsafe { std::slice::from_raw_parts_mut(start, ARENA) }
    }

    /// A pointer into the arena: mostly to `part`, else NULL, misaligned, or to another part.
    fn pointer(&mut self, source: &mut Source, part: usize) -> *mut u8 {
        let at = match source.u8() {
            0..228 => part,
            228..232 => return null_mut(),
            232..236 => part + 1,
            236..240 => part + 2,
            240..250 => source.choose(&PARTS),
            _ => usize::from(source.u16()) * (ARENA >> 16),
        };
        self.arena.as_mut_ptr().cast::<u8>().wrapping_add(at)
    }

    fn handle(&self, source: &mut Source) -> Option<usize> {
        let n = source.below(self.handles.len().max(1));
        (n < self.handles.len()).then_some(n)
    }

    /// Whether a call with these arrays only touches memory that is there, or must be refused for one of them.
    fn exists(&self, arrays: &[Option<Reach>]) -> bool {
        let start = self.arena.as_ptr().addr() as u128;
        let inside = |(pointer, bytes): Reach| {
            let at = pointer.addr() as u128;
            pointer.is_null() || at >= start && at + bytes <= start + ARENA as u128
        };
        // NULL may mean that an array is not wanted.
        let refused = |array: &Option<Reach>| {
            array.is_none_or(|(pointer, bytes)| !pointer.is_null() && bytes > isize::MAX as u128)
        };
        arrays.iter().any(refused) || arrays.iter().flatten().all(|reach| inside(*reach))
    }

    /// Makes a call and checks what it left behind; returns whether it succeeded. `outputs`: what it may have written then.
    fn call(&mut self, name: &str, outputs: &[Option<Reach>], call: impl FnOnce() -> kakeya_status) -> bool {
        let mut before = std::mem::take(&mut self.before);
        before.copy_from_slice(self.bytes());
        let status = call();
        // SAFETY: a text that ends in NUL and lives until this thread's next call.
        let error = unsafe { CStr::from_ptr(kakeya_last_error()) }.to_str().expect("texts are UTF-8");
        assert_ne!(status, KAKEYA_ERR_PANIC, "{name}: {error}");
        if status == KAKEYA_OK {
            let start = self.arena.as_ptr().addr();
            for (pointer, bytes) in outputs.iter().flatten().filter(|(p, _)| !p.is_null()) {
                let at = pointer.addr() - start;
                // A step without sequences succeeds before it looks at its arrays.
                let Some(end) = usize::try_from(*bytes).ok().and_then(|n| at.checked_add(n)) else {
                    continue;
                };
                if let (Some(copy), Some(now)) = (before.get_mut(at..end), self.bytes().get(at..end)) {
                    copy.copy_from_slice(now);
                }
            }
        } else {
            assert!(!error.is_empty(), "{name}: {status:?} without a text");
        }
        let changed = self.bytes() != &before[..];
        assert!(!changed, "{name}: {status:?} ({error}), yet bytes changed that are not its outputs");
        self.before = before;
        status == KAKEYA_OK
    }

    fn codec_new(&mut self, source: &mut Source) {
        let recipe = match source.below(16) {
            n @ 0..8 => RECIPES[n].as_bytes().to_vec(),
            8..12 => {
                let mut text = RECIPES[5].as_bytes().to_vec();
                let at = source.below(text.len());
                text[at] = source.u8();
                text
            }
            _ => {
                let n = source.below(64);
                source.take(n).to_vec()
            }
        };
        let model = match source.below(16) {
            n @ 0..6 => MODELS[n].as_bytes().to_vec(),
            6..10 => {
                let mut text = MODELS[source.below(6)].as_bytes().to_vec();
                let at = source.below(text.len());
                text[at] = source.u8();
                text
            }
            10..14 => {
                let mut field = || source.choose(&[1, 2, 3, 5, 64, 128, 4096, 1 << 20, 1 << 25, usize::MAX]);
                format!(
                    r#"{{"num_layers":{},"num_kv_heads":{},"num_q_heads":{},"head_dim":64,"max_position":{},"rope":null}}"#,
                    field(),
                    field(),
                    field(),
                    field()
                )
                .into_bytes()
            }
            _ => {
                let n = source.below(128);
                source.take(n).to_vec()
            }
        };
        let shape = std::str::from_utf8(&model).ok().and_then(|text| ModelShape::from_json(text).ok());
        // Large models are valid and take their time.
        if shape.as_ref().is_some_and(|s| {
            let pairs = s.rope.as_ref().map_or(0, |r| r.inv_freq.len());
            s.num_layers * s.num_kv_heads * s.head_dim > 4096 || s.max_blocks() * pairs > 4096
        }) {
            return;
        }
        let calibrated = std::str::from_utf8(&recipe)
            .is_ok_and(|text| Recipe::parse(text).is_ok_and(|recipe| recipe.calibrated));
        let artefact = match (source.below(8), &shape) {
            (0..4, Some(shape)) if calibrated => common::artefact(shape, 1),
            (4, Some(shape)) => {
                let mut file = common::artefact(shape, 1);
                let at = usize::from(source.u16()) % file.len();
                file[at] ^= source.u8();
                file
            }
            (5, Some(shape)) => common::artefact(shape, 1),
            (6, _) => source.take(64).to_vec(),
            _ => Vec::new(),
        };
        let pointer = if artefact.is_empty() { std::ptr::null() } else { artefact.as_ptr() };
        let mut codec = null_mut();
        let out: *mut *mut kakeya_codec = if source.u8() == 255 { null_mut() } else { &raw mut codec };
        let done = self.call("kakeya_codec_new", &[], || {
            // SAFETY: all texts and arrays live and are as long as said; `out` is NULL or a pointer of this frame.
            unsafe {
                kakeya_codec_new(
                    recipe.as_ptr().cast(),
                    recipe.len(),
                    model.as_ptr().cast(),
                    model.len(),
                    pointer,
                    artefact.len(),
                    out,
                )
            }
        });
        assert_eq!(done, !codec.is_null());
        if !done {
            return;
        }
        let mut page_bytes = 0;
        // SAFETY: the codec was just made; the size lives.
        let done = self.call("kakeya_codec_page_bytes", &[], || unsafe {
            kakeya_codec_page_bytes(codec, 0, &mut page_bytes)
        });
        assert!(done);
        self.handles.push(Handle { codec, shape: shape.expect("a codec was made of it"), page_bytes });
    }

    fn free(&mut self, source: &mut Source) {
        if let Some(n) = self.handle(source) {
            let handle = self.handles.remove(n);
            // SAFETY: it came from kakeya_codec_new and is forgotten with this.
            unsafe { kakeya_codec_free(handle.codec) };
        }
        // SAFETY: NULL is fine.
        unsafe { kakeya_codec_free(null_mut()) };
    }

    fn texts(&mut self, source: &mut Source) {
        let what = source.below(4);
        let cap = source.choose(&[0, 1, 64, 1024, 8000, usize::MAX]);
        let buf = self.pointer(source, TEXT);
        let reach = Some((buf.cast_const(), cap as u128));
        if !self.exists(&[reach]) {
            return;
        }
        let mut size = 0;
        let needed: *mut usize = if source.u8() == 255 { null_mut() } else { &raw mut size };
        let codec = self.handle(source).map_or(null_mut(), |n| self.handles[n].codec);
        let recipe = source.choose(&RECIPES);
        let buf = buf.cast::<c_char>();
        // SAFETY: codec and texts live; `buf` has `cap` bytes of the arena, is NULL, or claims more than an address space.
        self.call("text", &[reach], || unsafe {
            match what {
                0 => kakeya_codec_describe(codec, buf, cap, needed),
                1 => kakeya_recipe_list(buf, cap, needed),
                _ => kakeya_recipe_describe(recipe.as_ptr().cast(), recipe.len(), buf, cap, needed),
            }
        });
        let name = kakeya_status_name(source.u32() as i32);
        // SAFETY: static text.
        assert!(unsafe { CStr::from_ptr(name) }.to_str().expect("ASCII").starts_with("KAKEYA_"));
    }

    fn sizes(&mut self, source: &mut Source) {
        let codec = self.handle(source).map_or(null_mut(), |n| self.handles[n].codec);
        let layer = number(source, 0);
        let mut bytes = 0;
        // SAFETY: the codec lives or is NULL; so does the size.
        self.call("kakeya_codec_page_bytes", &[], || unsafe {
            kakeya_codec_page_bytes(codec, layer, &mut bytes)
        });
        let (recipe, head_dim) = (source.choose(&RECIPES), number(source, 64));
        // SAFETY: as above.
        self.call("kakeya_recipe_page_bytes", &[], || unsafe {
            kakeya_recipe_page_bytes(recipe.as_ptr().cast(), recipe.len(), head_dim, &mut bytes)
        });
        // SAFETY: all-zero is a value of a struct of integers.
        let mut layout: kakeya_page_layout = unsafe { std::mem::zeroed() };
        layout.struct_size = struct_size::<kakeya_page_layout>(source);
        // SAFETY: as above.
        let done = self.call("kakeya_codec_page_layout", &[], || unsafe {
            kakeya_codec_page_layout(codec, layer, &mut layout)
        });
        if done {
            assert!(layout.slots_offset + layout.num_slots * layout.slot_bytes <= layout.page_bytes);
        }
    }

    /// Puts numbers into a part of the arena: noise in one of the dtypes, a constant, or bytes of the input.
    fn fill(&mut self, source: &mut Source) {
        let at = source.choose(&PARTS);
        let n = [64, 1 << 10, 16 << 10, 72 << 10][source.below(4)].min(ARENA - at);
        let kind = source.below(5);
        let mut noise = Noise(u64::from(source.u8()));
        let given = if kind == 4 { source.take(32) } else { &[] };
        let value = source.f32();
        let part = &mut self.bytes()[at..at + n];
        let mut number = || (noise.uniform() * 4.0 - 2.0) as f32;
        match kind {
            0 => part.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&number().to_le_bytes())),
            1 => part
                .chunks_exact_mut(2)
                .for_each(|b| b.copy_from_slice(&half::bf16::from_f32(number()).to_le_bytes())),
            2 => part
                .chunks_exact_mut(2)
                .for_each(|b| b.copy_from_slice(&half::f16::from_f32(number()).to_le_bytes())),
            3 => part.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&value.to_le_bytes())),
            _ => part.iter_mut().zip(given.iter().cycle()).for_each(|(b, g)| *b = *g),
        }
    }

    /// Puts the arrays of a step into the arena as a serving engine would: one sequence in blocks of the table's order from a
    /// position on. Then one entry of one array is anything.
    fn indices(&mut self, source: &mut Source) {
        let history = usize::from(source.u8()) * 3;
        let tokens = source.below(TOKENS + 1);
        let table: [i32; BLOCKS] = std::array::from_fn(|b| ((b * 5 + 1) % BLOCKS) as i32);
        let mut put = |at: usize, bytes: &[u8]| self.bytes()[at..at + bytes.len()].copy_from_slice(bytes);
        for token in 0..TOKENS {
            let position = history + token;
            let block = i64::from(table[position / 128 % BLOCKS]);
            let slot = block * 128 + (position % 128) as i64;
            put(SLOT_MAPPING + 8 * token, &slot.to_le_bytes());
            put(POSITIONS + 4 * token, &(position as i32).to_le_bytes());
        }
        for row in 0..SEQUENCES {
            put(BLOCK_TABLE + 4 * row * BLOCKS, &table.map(i32::to_le_bytes).concat());
            let start = if row == 0 { 0 } else { tokens as i32 };
            put(QUERY_START + 4 * row, &start.to_le_bytes());
            put(SEQ_LENS + 4 * row, &((history + tokens) as i32).to_le_bytes());
        }
        put(QUERY_START + 4 * SEQUENCES, &(tokens as i32).to_le_bytes());
        let mut slots = [-1i32; BLOCKS];
        slots[table[history / 128 % BLOCKS] as usize] = 0;
        slots[table[(history + tokens) / 128 % BLOCKS] as usize] = ((history + tokens) / 128 % OPEN) as i32;
        put(OPEN_SLOT, &slots.map(i32::to_le_bytes).concat());
        if source.flag() {
            let at = source.choose(&[SLOT_MAPPING, POSITIONS, QUERY_START, SEQ_LENS, BLOCK_TABLE, OPEN_SLOT]);
            let entry = source.below(16);
            let value = match source.below(4) {
                0 => -1,
                1 => i32::from(source.u8()),
                2 => source.u32() as i32,
                _ => i32::MAX,
            };
            put(at + 4 * entry, &value.to_le_bytes());
        }
    }

    fn seal(&mut self, source: &mut Source) {
        let Some(n) = self.handle(source) else { return };
        let (codec, d, page) =
            (self.handles[n].codec, self.handles[n].shape.head_dim, self.handles[n].page_bytes);
        let all = self.handles[n].shape.num_kv_heads;
        let heads = number(source, all);
        let dtype = number(source, usual_dtype(n));
        let strides = [heads as usize * d, d];
        let args = kakeya_seal_args {
            struct_size: struct_size::<kakeya_seal_args>(source),
            layer: number(source, 0),
            first_head: number(source, 0),
            num_heads: heads,
            dtype,
            block_index: number(source, 1),
            k: self.pointer(source, K).cast::<c_void>(),
            v: self.pointer(source, V).cast::<c_void>(),
            k_token_stride: stride(source, strides[0]),
            k_head_stride: stride(source, strides[1]),
            v_token_stride: stride(source, strides[0]),
            v_head_stride: stride(source, strides[1]),
            pages: self.pointer(source, PAGES),
            page_head_stride: stride(source, page),
        };
        let size = element_bytes(dtype);
        let tensor = |p: *const c_void, s: [i64; 2]| {
            span([(128, s[0]), (heads, s[1])], d, size).map(|bytes| (p.cast::<u8>(), bytes))
        };
        let pages = span([(1, 0), (heads, args.page_head_stride)], page, 1)
            .map(|bytes| (args.pages.cast_const(), bytes));
        let inputs = [
            tensor(args.k, [args.k_token_stride, args.k_head_stride]),
            tensor(args.v, [args.v_token_stride, args.v_head_stride]),
        ];
        if self.exists(&[inputs[0], inputs[1], pages]) {
            // SAFETY: the codec lives; all arrays lie in the arena, or one of them is refused before any is read.
            self.call("kakeya_seal", &[pages], || unsafe { kakeya_seal(codec, &args) });
        }
    }

    fn open(&mut self, source: &mut Source) {
        let Some(n) = self.handle(source) else { return };
        let handle = &self.handles[n];
        let (codec, page_bytes) = (handle.codec, handle.page_bytes);
        let floats = 128 * handle.shape.head_dim;
        let (layer, head) = (number(source, 0), number(source, 0));
        let page = self.pointer(source, PAGES);
        let (k, v) = (self.pointer(source, OPEN_BLOCKS), self.pointer(source, OUT));
        let page_len = number(source, page_bytes) as usize;
        let out_len = number(source, floats) as usize;
        let output = |p: *mut u8| Some((p.cast_const(), 4 * floats as u128));
        // Never more than that is touched, whatever the lengths claim.
        if self.exists(&[Some((page.cast_const(), page_bytes as u128)), output(k), output(v)]) {
            let (k, v, out) = (k.cast::<f32>(), v.cast::<f32>(), [output(k), output(v)]);
            // SAFETY: the codec lives; all arrays lie in the arena.
            self.call("kakeya_open", &out, || unsafe {
                kakeya_open(codec, layer, head, page, page_len, k, v, out_len)
            });
        }
    }

    fn write(&mut self, source: &mut Source) {
        let Some(n) = self.handle(source) else { return };
        let (codec, d, page) =
            (self.handles[n].codec, self.handles[n].shape.head_dim, self.handles[n].page_bytes);
        let all = self.handles[n].shape.num_kv_heads;
        let heads = number(source, all);
        let dtype = number(source, usual_dtype(n));
        let tokens = source.below(TOKENS + 1);
        let args = kakeya_write_args {
            struct_size: struct_size::<kakeya_write_args>(source),
            layer: number(source, 0),
            first_head: number(source, 0),
            num_heads: heads,
            dtype,
            num_tokens: number(source, tokens),
            num_blocks: number(source, BLOCKS),
            num_open: number(source, OPEN),
            k: self.pointer(source, K).cast::<c_void>(),
            v: self.pointer(source, V).cast::<c_void>(),
            k_token_stride: stride(source, heads as usize * d),
            k_head_stride: stride(source, d),
            v_token_stride: stride(source, heads as usize * d),
            v_head_stride: stride(source, d),
            slot_mapping: self.pointer(source, SLOT_MAPPING).cast::<i64>(),
            positions: self.pointer(source, POSITIONS).cast::<i32>(),
            pages: self.pointer(source, PAGES),
            page_block_stride: stride(source, heads as usize * page),
            page_head_stride: stride(source, page),
            open_blocks: self.pointer(source, OPEN_BLOCKS).cast::<c_void>(),
            open_slot: self.pointer(source, OPEN_SLOT).cast::<i32>(),
        };
        let size = element_bytes(dtype);
        let tensor = |p: *const c_void, s: [i64; 2]| {
            span([(args.num_tokens, s[0]), (heads, s[1])], d, size).map(|bytes| (p.cast::<u8>(), bytes))
        };
        let array = |p: *const u8, n: u32, size: usize| Some((p, u128::from(n) * size as u128));
        let pages =
            span([(args.num_blocks, args.page_block_stride), (heads, args.page_head_stride)], page, 1)
                .map(|bytes| (args.pages.cast_const(), bytes));
        let open = array(args.open_blocks.cast(), args.num_open, 2 * heads as usize * 128 * d * size);
        let arrays = [
            tensor(args.k, [args.k_token_stride, args.k_head_stride]),
            tensor(args.v, [args.v_token_stride, args.v_head_stride]),
            array(args.slot_mapping.cast(), args.num_tokens, 8),
            array(args.positions.cast(), args.num_tokens, 4),
            array(args.open_slot.cast(), args.num_blocks, 4),
            pages,
            open,
        ];
        if self.exists(&arrays) && self.maps(args.num_blocks) {
            // SAFETY: the codec lives; all arrays lie in the arena, or one of them is refused before any is read.
            self.call("kakeya_write", &[pages, open], || unsafe { kakeya_write(codec, &args) });
        }
    }

    /// Whether a map of so many blocks fits: a caller that gives none has the library make one of 4 bytes a block, and no
    /// cache has more blocks than memory has room for pages.
    fn maps(&self, blocks: u32) -> bool {
        (blocks as usize) < ARENA
    }

    /// kakeya_attend, or kakeya_attend_with and the options of some models.
    fn attend(&mut self, source: &mut Source, with: bool) {
        let Some(n) = self.handle(source) else { return };
        let (codec, page) = (self.handles[n].codec, self.handles[n].page_bytes);
        let shape = &self.handles[n].shape;
        let (d, all, group) = (shape.head_dim, shape.num_kv_heads, shape.num_q_heads / shape.num_kv_heads);
        let heads = number(source, all);
        let q_heads = number(source, all * group);
        let dtype = number(source, usual_dtype(n));
        let tokens = source.below(TOKENS + 1);
        let sequences = 1 + source.below(SEQUENCES);
        let args = kakeya_attend_args {
            struct_size: struct_size::<kakeya_attend_args>(source),
            layer: number(source, 0),
            first_head: number(source, 0),
            num_kv_heads: heads,
            num_q_heads: q_heads,
            dtype,
            num_seqs: number(source, sequences),
            num_tokens: number(source, tokens),
            num_blocks: number(source, BLOCKS),
            num_open: number(source, OPEN),
            max_blocks_per_seq: number(source, BLOCKS),
            flags: u32::from(source.flag()) | if source.u8() == 255 { 2 } else { 0 },
            scale: if source.u8() < 224 { 0.125 } else { source.f32() },
            q: self.pointer(source, Q).cast::<c_void>(),
            k: self.pointer(source, K).cast::<c_void>(),
            v: self.pointer(source, V).cast::<c_void>(),
            q_token_stride: stride(source, q_heads as usize * d),
            q_head_stride: stride(source, d),
            k_token_stride: stride(source, heads as usize * d),
            k_head_stride: stride(source, d),
            v_token_stride: stride(source, heads as usize * d),
            v_head_stride: stride(source, d),
            out: self.pointer(source, OUT).cast::<c_void>(),
            out_token_stride: stride(source, q_heads as usize * d),
            out_head_stride: stride(source, d),
            query_start: self.pointer(source, QUERY_START).cast::<i32>(),
            seq_lens: self.pointer(source, SEQ_LENS).cast::<i32>(),
            block_table: self.pointer(source, BLOCK_TABLE).cast::<i32>(),
            block_table_stride: stride(source, BLOCKS),
            pages: self.pointer(source, PAGES),
            page_block_stride: stride(source, heads as usize * page),
            page_head_stride: stride(source, page),
            open_blocks: self.pointer(source, OPEN_BLOCKS).cast::<c_void>(),
            open_slot: self.pointer(source, OPEN_SLOT).cast::<i32>(),
            lse: self.pointer(source, LSE).cast::<f32>(),
        };
        let size = element_bytes(dtype);
        let tensor = |p: *const c_void, heads: u32, s: [i64; 2]| {
            span([(args.num_tokens, s[0]), (heads, s[1])], d, size).map(|bytes| (p.cast::<u8>(), bytes))
        };
        let array = |p: *const u8, n: usize, size: usize| Some((p, n as u128 * size as u128));
        let out = tensor(args.out, q_heads, [args.out_token_stride, args.out_head_stride]);
        let lse = array(args.lse.cast(), args.num_tokens as usize * q_heads as usize, 4);
        let arrays = [
            tensor(args.q, q_heads, [args.q_token_stride, args.q_head_stride]),
            tensor(args.k, heads, [args.k_token_stride, args.k_head_stride]),
            tensor(args.v, heads, [args.v_token_stride, args.v_head_stride]),
            out,
            lse,
            array(args.query_start.cast(), args.num_seqs as usize + 1, 4),
            array(args.seq_lens.cast(), args.num_seqs as usize, 4),
            span([(args.num_seqs, args.block_table_stride), (1, 0)], args.max_blocks_per_seq as usize, 4)
                .map(|bytes| (args.block_table.cast::<u8>(), bytes)),
            span([(args.num_blocks, args.page_block_stride), (heads, args.page_head_stride)], page, 1)
                .map(|bytes| (args.pages, bytes)),
            array(args.open_blocks.cast(), args.num_open as usize, 2 * heads as usize * 128 * d * size),
            array(args.open_slot.cast(), args.num_blocks as usize, 4),
        ];
        if !self.exists(&arrays) || !self.maps(args.num_blocks) {
            return;
        }
        if !with {
            // SAFETY: the codec lives; all arrays lie in the arena, or one of them is refused before any is read.
            self.call("kakeya_attend", &[out, lse], || unsafe { kakeya_attend(codec, &args) });
            return;
        }
        let options = kakeya_attend_options {
            struct_size: struct_size::<kakeya_attend_options>(source),
            soft_cap: match source.u8() {
                0..64 => 0.0,
                64..224 => 30.0,
                _ => source.f32(),
            },
            sinks: self.pointer(source, SINKS).cast::<f32>(),
        };
        let given: *const kakeya_attend_options =
            if source.u8() == 255 { null_mut() } else { &raw const options };
        if self.exists(&[array(options.sinks.cast(), q_heads as usize, 4)]) {
            // SAFETY: as above, and the options are NULL or of this frame.
            self.call("kakeya_attend_with", &[out, lse], || unsafe {
                kakeya_attend_with(codec, &args, given)
            });
        }
    }
}

/// The dtype that calls with a codec mostly take: one each, so that what one call writes means something to the next.
fn usual_dtype(handle: usize) -> usize {
    [2, 0, 1][handle % 3]
}

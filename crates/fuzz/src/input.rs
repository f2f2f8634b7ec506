//! Arbitrary bytes as choices; what is missing reads as zero, so every input means something.

use half::bf16;

/// A cursor over a target's bytes.
pub struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        *first
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// 0..n from one byte, or from two where n needs them.
    pub fn below(&mut self, n: usize) -> usize {
        let x = if n <= 256 { usize::from(self.byte()) } else { usize::from(self.u16()) };
        x % n
    }

    /// True once in n times, and never when the bytes have run out.
    pub fn rarely(&mut self, n: u8) -> bool {
        !self.is_empty() && self.byte() % n == n - 1
    }

    pub fn pick<'b, T>(&mut self, from: &'b [T]) -> &'b T {
        &from[self.below(from.len())]
    }

    /// All bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// `count` values: a base pattern of one of several kinds, with single values changed.
    pub fn rows(&mut self, count: usize) -> Vec<f32> {
        let kind = self.below(5);
        let scale = bf16::from_bits(self.u16()).to_f32();
        let seed = u64::from(self.u16());
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        let mut rows: Vec<f32> = (0..count)
            .map(|i| match kind {
                0 => 0.0,
                1 => scale,
                2 => noise() * 4.0,
                3 => noise() * scale,
                // Steps of a channel, as keys with offsets have them.
                _ => noise() + (i % 13) as f32 * scale,
            })
            .collect();
        for _ in 0..self.below(24) {
            let at = usize::from(self.u16()) % count;
            rows[at] = match self.below(3) {
                0 => bf16::from_bits(self.u16()).to_f32(),
                1 => f32::from_bits(u32::from(self.u16()) << 16 | u32::from(self.u16())),
                _ => -rows[at],
            };
        }
        rows
    }
}

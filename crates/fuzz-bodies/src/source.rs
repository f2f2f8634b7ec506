//! The fuzzer's bytes as a stream of decisions. Past the end everything reads as zero, so that every input means
//! something and a prefix of an input does what the input began with.

pub struct Source<'a>(&'a [u8]);

/// Numbers at which arithmetic on keys, values and statistics changes its manner.
const EDGES: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    1.2e-38,
    1e-12,
    1e-6,
    358.0,
    65504.0,
    16_777_216.0,
    -16_777_216.0,
    16_777_218.0,
    f32::MAX,
    f32::INFINITY,
    f32::NAN,
];

impl<'a> Source<'a> {
    pub fn new(bytes: &'a [u8]) -> Source<'a> {
        Source(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `n` bytes, fewer at the end.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let taken = self.take(N);
        std::array::from_fn(|i| taken.get(i).copied().unwrap_or(0))
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A number below `n`, from one byte.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n
    }

    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// One of `choices`.
    pub fn choose<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A float: an edge, a small number with a fraction, or any bits.
    pub fn f32(&mut self) -> f32 {
        match self.u8() {
            n @ 0..32 => EDGES[usize::from(n) % EDGES.len()],
            32..192 => f32::from(self.u16() as i16) / 1024.0,
            _ => f32::from_bits(self.u32()),
        }
    }
}

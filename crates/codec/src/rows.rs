//! Typed, strided views of what the engine hands over: keys, values and queries in its own dtype.

use crate::error::{Error, Result};
use half::{bf16, f16};

/// Elements of an engine's tensor.
#[derive(Debug, Clone, Copy)]
pub enum Elements<'a> {
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
}

/// Writable elements of an engine's tensor.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
    F32(&'a mut [f32]),
}

impl<'a> Elements<'a> {
    pub fn len(&self) -> usize {
        match self {
            Elements::Bf16(s) => s.len(),
            Elements::F16(s) => s.len(),
            Elements::F32(s) => s.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widens `out.len()` elements from `at` on; exact for all three types.
    #[inline(always)]
    pub fn load(&self, at: usize, out: &mut [f32]) {
        let r = at..at + out.len();
        match self {
            Elements::Bf16(s) => out.iter_mut().zip(&s[r]).for_each(|(o, x)| *o = x.to_f32()),
            Elements::F16(s) => out.iter_mut().zip(&s[r]).for_each(|(o, x)| *o = x.to_f32()),
            Elements::F32(s) => out.copy_from_slice(&s[r]),
        }
    }
}

impl ElementsMut<'_> {
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same elements, read-only.
    pub fn as_ref(&self) -> Elements<'_> {
        match self {
            ElementsMut::Bf16(s) => Elements::Bf16(s),
            ElementsMut::F16(s) => Elements::F16(s),
            ElementsMut::F32(s) => Elements::F32(s),
        }
    }

    /// Rounds a row into place from `at` on.
    #[inline(always)]
    pub fn store(&mut self, at: usize, row: &[f32]) {
        let r = at..at + row.len();
        match self {
            ElementsMut::Bf16(s) => s[r].iter_mut().zip(row).for_each(|(o, x)| *o = bf16::from_f32(*x)),
            ElementsMut::F16(s) => s[r].iter_mut().zip(row).for_each(|(o, x)| *o = f16::from_f32(*x)),
            ElementsMut::F32(s) => s[r].copy_from_slice(row),
        }
    }

    /// Copies `n` elements of the same type without widening, so that raw data stays raw.
    pub fn copy_from(&mut self, at: usize, from: &Elements<'_>, from_at: usize, n: usize) {
        match (self, from) {
            (ElementsMut::Bf16(d), Elements::Bf16(s)) => {
                d[at..at + n].copy_from_slice(&s[from_at..from_at + n])
            }
            (ElementsMut::F16(d), Elements::F16(s)) => {
                d[at..at + n].copy_from_slice(&s[from_at..from_at + n])
            }
            (ElementsMut::F32(d), Elements::F32(s)) => {
                d[at..at + n].copy_from_slice(&s[from_at..from_at + n])
            }
            (d, s) => {
                let mut row = vec![0.0; n];
                s.load(from_at, &mut row);
                d.store(at, &row);
            }
        }
    }
}

/// A tensor `[tokens, heads, head_dim]`: strides in elements, head_dim contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub data: Elements<'a>,
    pub token_stride: usize,
    pub head_stride: usize,
}

impl<'a> Tensor<'a> {
    /// First element of (token, head).
    #[inline(always)]
    pub fn at(&self, token: usize, head: usize) -> usize {
        token * self.token_stride + head * self.head_stride
    }

    /// Refuses a view whose last row would end outside the elements.
    pub fn check(&self, what: &'static str, tokens: usize, heads: usize, head_dim: usize) -> Result<()> {
        check_span(what, self.data.len(), &[(tokens, self.token_stride), (heads, self.head_stride)], head_dim)
    }

    /// The rows of one head, from `token` on.
    pub fn head(&self, token: usize, head: usize) -> Rows<'a> {
        Rows { data: self.data, start: self.at(token, head), stride: self.token_stride }
    }
}

/// Refuses strided dimensions that reach outside `have` elements.
pub(crate) fn check_span(what: &'static str, have: usize, dims: &[(usize, usize)], row: usize) -> Result<()> {
    let mut last: usize = 0;
    for &(n, stride) in dims {
        if n == 0 {
            return Ok(());
        }
        let reach = (n - 1).checked_mul(stride).ok_or(Error::Overflow(what))?;
        last = last.checked_add(reach).ok_or(Error::Overflow(what))?;
    }
    let need = last.checked_add(row).ok_or(Error::Overflow(what))?;
    if need > have { Err(Error::BufferTooSmall { what, have, need }) } else { Ok(()) }
}

/// Rows of one head: token j's `head_dim` elements begin at `start + j * stride`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pub data: Elements<'a>,
    pub start: usize,
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows of `d` neighbouring floats.
    pub fn dense(data: &'a [f32], d: usize) -> Rows<'a> {
        Rows { data: Elements::F32(data), start: 0, stride: d }
    }

    /// Loads row `j`.
    #[inline(always)]
    pub fn load(&self, j: usize, out: &mut [f32]) {
        self.data.load(self.start + j * self.stride, out);
    }

    /// Refuses rows that reach outside the elements.
    pub fn check(&self, what: &'static str, rows: usize, head_dim: usize) -> Result<()> {
        let have = self.data.len().saturating_sub(self.start);
        check_span(what, have, &[(rows, self.stride)], head_dim)
    }
}

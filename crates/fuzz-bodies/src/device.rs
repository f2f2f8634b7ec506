//! Target `device`: the kernels' device functions, compiled for the host, against the codec. They seal a block to the same
//! page or refuse it too, open a damaged page to the same numbers or to NaN where the codec refuses it, and read single
//! units of any bytes as the codec does.

use kakeya_codec::trellis;
use kakeya_codec::unit::{self, CODES, Codes, LANES, unit_bytes};
use kakeya_codec::{BLOCK, Rows};

use crate::model::{Model, model};
use crate::rows::rows;
use crate::same;
use crate::source::Source;

/// See the top of this file.
pub fn device(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    if source.u8() & 3 == 3 {
        return units(&mut source);
    }
    let Some(model) = model(&mut source) else { return };
    let codec = &model.codec;
    let (layer, head) = (source.below(2), source.below(2));
    let block = [0, 1, 30, 31][source.below(4)];
    let (at, xor) = (usize::from(source.u16()), source.u8());
    let (k, v) = rows(&mut source, codec, (layer, head, block));
    let d = codec.shape().head_dim;

    let (mut ours, mut theirs) = (vec![0xaa; codec.page_bytes()], vec![0xaa; codec.page_bytes()]);
    let sealed = codec.seal(layer, head, block, Rows::dense(&k, d), Rows::dense(&v, d), &mut ours).is_ok();
    let tables = model.device_tables();
    let by_device = kakeya_bridge::seal(tables, layer as u32, head as u32, block as u32, &k, &v, &mut theirs);
    assert_eq!(by_device.expect("valid arguments"), sealed);
    let first = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert!(first.is_none(), "sealed pages differ at byte {first:?}");
    if sealed {
        open(&model, layer, head, &ours);
        let at = at % ours.len();
        ours[at] ^= xor;
        open(&model, layer, head, &ours);
    }
}

fn open(model: &Model, layer: usize, head: usize, page: &[u8]) {
    let n = BLOCK * model.codec.shape().head_dim;
    let mut rows = [vec![7.0; n], vec![7.0; n], vec![f32::NAN; n], vec![f32::NAN; n]];
    let [k_device, v_device, k, v] = &mut rows;
    kakeya_bridge::open(model.device_tables(), layer as u32, head as u32, page, k_device, v_device)
        .expect("valid arguments");
    // An error leaves the codec's rows NaN, which is what the device writes then.
    let opened = model.codec.open(layer, head, page, k, v);
    assert!(same(k, k_device) && same(v, v_device), "opened rows differ: {opened:?}");
}

/// One unit of any bytes, of all widths, scalar and trellis.
fn units(source: &mut Source) {
    let width = 1 + source.below(6);
    let mut state: [usize; LANES] = source.array::<LANES>().map(|s| usize::from(s & 7));
    let given = source.rest();
    let mut bytes: Vec<u8> = given.iter().copied().cycle().take(unit_bytes(width)).collect();
    bytes.resize(unit_bytes(width), 0);

    let mut codes: Codes = [[0; LANES]; CODES];
    unit::unpack(width, &bytes, &mut codes);
    let mut read = vec![0; CODES * LANES];
    kakeya_bridge::unpack(width, &bytes, &mut read).expect("valid arguments");
    assert_eq!(codes.concat(), read);
    let mut packed = vec![0xff; bytes.len()];
    kakeya_bridge::pack(width, &read, &mut packed).expect("valid arguments");
    assert_eq!(packed, bytes);

    let mut path: Codes = [[0; LANES]; CODES];
    unit::unpack_trellis(width, &bytes, &mut path, &mut codes);
    // The last three path bits of a chain are bits 31, 29 and 27 of the word before.
    let mut before: Vec<u32> =
        state.iter().map(|s| ((s & 1) << 31 | (s >> 1 & 1) << 29 | (s >> 2) << 27) as u32).collect();
    kakeya_bridge::trellis_symbols(width, &bytes, &mut before, &mut read).expect("valid arguments");
    for n in 0..CODES {
        for lane in 0..LANES {
            let bit = usize::from(path[n][lane]);
            let symbol = 4 * usize::from(codes[n][lane]) + trellis::subset(state[lane], bit);
            assert_eq!(usize::from(read[n * LANES + lane]), symbol, "width {width} lane {lane} n {n}");
            state[lane] = trellis::next(state[lane], bit);
        }
    }
    for (word, state) in before.iter().zip(state) {
        assert_eq!((word >> 31 | (word >> 29 & 1) << 1 | (word >> 27 & 1) << 2) as usize, state);
    }
}

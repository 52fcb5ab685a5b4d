//! What the screen shows: text while the loader is at work, graphics for the kernel (INT 10h; VESA
//! BIOS Extension core functions standard 3.0, functions 4F00h to 4F02h).

use core::{
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use arrayvec::ArrayVec;
use boot::{load::Framebuffer, vbe};

use super::{Registers, SCRATCH, call};

/// The mode of 80 by 25 characters.
const TEXT: u32 = 3;

/// What a VBE function leaves in AX if it did its work.
const SUCCESS: u32 = 0x004f;

/// Added to a mode's number to be set: with its linear framebuffer.
const LINEAR: u32 = 1 << 14;

/// The end of a list of modes.
const END: u16 = 0xffff;

/// Modes that are looked at: far more than there are.
const MAX_MODES: usize = 512;

/// Whether [`set`] has been called.
static IS_GRAPHIC: AtomicBool = AtomicBool::new(false);

/// A graphics mode.
pub struct Mode {
    number: u16,
    /// Where it has its pixels.
    pub framebuffer: Framebuffer,
}

/// Makes sure that the screen shows text.
pub fn show_text() {
    let mut registers = Registers { eax: 0x0f00, ..Registers::default() };
    // SAFETY: the service writes no memory.
    unsafe { call(0x10, &mut registers) };
    let is_text = registers.eax & 0x7f == TEXT;
    if IS_GRAPHIC.swap(false, Ordering::Relaxed) || !is_text {
        let mut registers = Registers { eax: TEXT, ..Registers::default() };
        // SAFETY: the service writes to the screen and to the BIOS's own data.
        unsafe { call(0x10, &mut registers) };
    }
}

/// The best mode among those whose framebuffer `is_free` from anything else, if there is one.
pub fn best(is_free: impl Fn(&Framebuffer) -> bool) -> Option<Mode> {
    let (version, numbers) = modes()?;
    let mode = |number| {
        let framebuffer = vbe::decode(&describe(number)?, version)?;
        is_free(&framebuffer).then_some(Mode { number, framebuffer })
    };
    numbers.into_iter().filter_map(mode).max_by_key(|mode| vbe::rank(&mode.framebuffer.info))
}

/// Sets a mode; whether that worked.
pub fn set(mode: &Mode) -> bool {
    IS_GRAPHIC.store(true, Ordering::Relaxed);
    let mut registers =
        Registers { eax: 0x4f02, ebx: u32::from(mode.number) | LINEAR, ..Registers::default() };
    // SAFETY: the service writes to the screen and to the BIOS's own data.
    unsafe { call(0x10, &mut registers) };
    registers.eax & 0xffff == SUCCESS
}

/// The standard's version and the numbers of all modes.
fn modes() -> Option<(u16, ArrayVec<u16, MAX_MODES>)> {
    let (es, di) = SCRATCH.put(b"VBE2");
    let mut registers = Registers { eax: 0x4f00, edi: u32::from(di), es, ..Registers::default() };
    // SAFETY: the service writes the 512 bytes of the buffer at most.
    unsafe { call(0x10, &mut registers) };
    let info = SCRATCH.get::<18>();
    let word = |at: usize| u16::from_le_bytes([info[at], info[at + 1]]);
    let version = word(4);
    if registers.eax & 0xffff != SUCCESS || !info.starts_with(b"VESA") || version < 0x200 {
        return None;
    }
    // It can be in the buffer.
    let list = (usize::from(word(16)) << 4) + usize::from(word(14));
    let number = |index: usize| {
        let at = ptr::with_exposed_provenance::<u16>(list + 2 * index);
        // SAFETY: a segment and an offset lead to memory below 2 MiB, all of which can be read.
        unsafe { at.read_unaligned() }
    };
    Some((version, (0..MAX_MODES).map(number).take_while(|number| *number != END).collect()))
}

/// The description of a mode, as far as the BIOS gives one.
fn describe(number: u16) -> Option<[u8; vbe::MODE_SIZE]> {
    let (es, di) = SCRATCH.put(&[]);
    let mut registers = Registers {
        eax: 0x4f01,
        ecx: u32::from(number),
        edi: u32::from(di),
        es,
        ..Registers::default()
    };
    // SAFETY: the service writes 256 bytes of the buffer.
    unsafe { call(0x10, &mut registers) };
    (registers.eax & 0xffff == SUCCESS).then(|| SCRATCH.get())
}

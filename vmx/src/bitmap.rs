//! MSR and I/O bitmaps.
//!
//! Source: SDM volume 3, sections "MSR-Bitmap Address" and "I/O-Bitmap Addresses".

/// The MSR bitmaps: one page, a set bit makes the access exit.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
pub struct MsrBitmap([u8; 4096]);

const _: () = assert!(size_of::<MsrBitmap>() == 4096);

impl MsrBitmap {
    /// Every access exits.
    pub const fn all_exit() -> Self {
        Self([0xff; 4096])
    }

    /// Lets the guest read `msr` without an exit.
    pub const fn pass_read(&mut self, msr: u32) {
        self.clear(0, msr);
    }

    /// Lets the guest write `msr` without an exit.
    pub const fn pass_write(&mut self, msr: u32) {
        self.clear(2048, msr);
    }

    /// Whether reading `msr` exits.
    pub const fn read_exits(&self, msr: u32) -> bool {
        self.exits(0, msr)
    }

    /// Whether writing `msr` exits.
    pub const fn write_exits(&self, msr: u32) -> bool {
        self.exits(2048, msr)
    }

    /// Byte and bit of an MSR; `None` outside the two ranges that have bits, where every access
    /// exits. Low range 0 to 0x1fff at +0, high range 0xc0000000 to 0xc0001fff at +1024.
    const fn position(msr: u32) -> Option<(usize, u8)> {
        let base = match msr & !0x1fff {
            0 => 0,
            0xc000_0000 => 1024,
            _ => return None,
        };
        let index = (msr & 0x1fff) as usize;
        Some((base + index / 8, 1 << (index % 8)))
    }

    const fn clear(&mut self, half: usize, msr: u32) {
        let Some((byte, bit)) = Self::position(msr) else {
            panic!("an MSR outside the bitmap's ranges always exits")
        };
        self.0[half + byte] &= !bit;
    }

    const fn exits(&self, half: usize, msr: u32) -> bool {
        match Self::position(msr) {
            Some((byte, bit)) => self.0[half + byte] & bit != 0,
            None => true,
        }
    }
}

/// The byte that a page of an I/O bitmap is filled with so that every port exits. One page serves
/// as both bitmaps, A and B.
pub const IO_ALL_EXIT: u8 = 0xff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_passed_does_not_exit() {
        let mut bitmap = MsrBitmap::all_exit();
        bitmap.pass_read(0x10);
        bitmap.pass_write(0xc000_0102);
        for msr in
            (0..0x2000).chain(0xc000_0000..0xc000_2000).chain([0x2000, 0x4000_0000, u32::MAX])
        {
            assert_eq!(bitmap.read_exits(msr), msr != 0x10, "{msr:#x}");
            assert_eq!(bitmap.write_exits(msr), msr != 0xc000_0102, "{msr:#x}");
        }
    }
}

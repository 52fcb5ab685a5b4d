//! A guest's memory: 2-MiB frames of the host, copied in and out, never borrowed.

use alloc::vec::Vec;

use vmx::addr::{GuestPhysAddr, HostPhysAddr};
use vmx::walk::{GuestRead, GuestWrite};

use crate::frames::LARGE_FRAME;
use crate::memory;

/// The address is not, or not all, the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemoryRange;

/// Memory from guest-physical address 0 upwards, without holes.
#[derive(Debug)]
pub struct GuestMemory {
    frames: Vec<HostPhysAddr>,
}

impl GuestMemory {
    /// None yet; it grows to `bytes`, a multiple of 2 MiB.
    pub fn with_room_for(bytes: u64) -> Self {
        Self { frames: Vec::with_capacity((bytes / LARGE_FRAME) as usize) }
    }

    /// Adds 2 MiB of zeroed memory; `None` if there are none.
    pub fn grow(&mut self) -> Option<()> {
        self.frames.push(memory::allocate_large_frame()?);
        Some(())
    }

    /// In bytes.
    pub fn len(&self) -> u64 {
        self.frames.len() as u64 * LARGE_FRAME
    }

    /// The frames, with the guest-physical address of each.
    pub fn frames(&self) -> impl Iterator<Item = (GuestPhysAddr, HostPhysAddr)> {
        let addresses = (0..).step_by(LARGE_FRAME as usize).map(GuestPhysAddr::new_truncate);
        addresses.zip(self.frames.iter().copied())
    }

    /// Calls `copy` with the host's pointer for each part of `len` bytes at `gpa` that lies in one
    /// frame, and where that part starts and how long it is.
    fn parts(
        &self,
        gpa: GuestPhysAddr,
        len: usize,
        mut copy: impl FnMut(*mut u8, usize, usize),
    ) -> Result<(), OutOfMemoryRange> {
        let start = gpa.as_u64();
        let end = start.checked_add(len as u64).ok_or(OutOfMemoryRange)?;
        if end > self.len() {
            return Err(OutOfMemoryRange);
        }
        let mut done = 0;
        while done < len {
            let at = start + done as u64;
            let offset = at % LARGE_FRAME;
            let part = (len - done).min((LARGE_FRAME - offset) as usize);
            let frame = self.frames[(at / LARGE_FRAME) as usize].as_u64();
            copy(memory::to_virtual(HostPhysAddr::new_truncate(frame + offset)), done, part);
            done += part;
        }
        Ok(())
    }

    /// Copies `bytes` into the guest.
    ///
    /// # Errors
    ///
    /// [`OutOfMemoryRange`]; nothing is written then.
    pub fn write(&self, gpa: GuestPhysAddr, bytes: &[u8]) -> Result<(), OutOfMemoryRange> {
        self.parts(gpa, bytes.len(), |pointer, done, part| {
            // SAFETY: (1) `parts` keeps within one of the guest's frames and within `bytes`;
            // (2) no reference to guest memory exists, so nothing can overlap.
            unsafe { pointer.copy_from_nonoverlapping(bytes[done..].as_ptr(), part) };
        })
    }
}

impl GuestRead for GuestMemory {
    #[inline]
    fn read_u64(&self, gpa: GuestPhysAddr) -> Option<u64> {
        let frame = self.frames.get((gpa.as_u64() / LARGE_FRAME) as usize)?;
        let offset = (gpa.as_u64() % LARGE_FRAME).min(LARGE_FRAME - 8);
        let pointer =
            memory::to_virtual::<u64>(HostPhysAddr::new_truncate(frame.as_u64() + offset));
        // SAFETY: eight bytes within one of the guest's frames.
        Some(unsafe { pointer.read_unaligned() })
    }

    fn read(&self, gpa: GuestPhysAddr, buffer: &mut [u8]) -> bool {
        let len = buffer.len();
        let pointer = buffer.as_mut_ptr();
        self.parts(gpa, len, |source, done, part| {
            // SAFETY: as for `write`; `done + part` is at most the buffer's length.
            unsafe { pointer.add(done).copy_from_nonoverlapping(source, part) };
        })
        .is_ok()
    }
}

impl GuestWrite for GuestMemory {
    fn write(&self, gpa: GuestPhysAddr, bytes: &[u8]) -> bool {
        Self::write(self, gpa, bytes).is_ok()
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        self.frames.iter().for_each(|frame| memory::free_large_frame(*frame));
    }
}

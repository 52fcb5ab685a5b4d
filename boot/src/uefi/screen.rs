//! The screen: in which mode it is left to the kernel.

use boot::{
    gop::{Layout, Mode},
    load::Framebuffer,
};
use uefi::{
    Handle, Identify,
    boot::{
        self as services, OpenProtocolAttributes, OpenProtocolParams, ScopedProtocol, SearchType,
    },
    proto::console::gop::{GraphicsOutput, ModeInfo, PixelFormat},
};
use x86_64::PhysAddr;

use crate::console::{CONSOLE_OUT_DEVICE, device_path};

/// Sees to it that there is a mode good for text, if there is a screen whose pixels can be written.
/// The firmware's console may show nothing from now on.
pub fn set_up() -> Option<Framebuffer> {
    // Those that the console uses come first: the others may have no screen connected.
    [&CONSOLE_OUT_DEVICE, &GraphicsOutput::GUID].into_iter().find_map(|mark| {
        let handles = services::locate_handle_buffer(SearchType::ByProtocol(mark)).ok()?;
        handles.iter().find_map(|handle| {
            // The one without is the firmware's console itself.
            device_path(*handle)?;
            framebuffer(open(*handle)?)
        })
    })
}

/// Opened beside the firmware's console, which goes on using it.
fn open(handle: Handle) -> Option<ScopedProtocol<GraphicsOutput>> {
    let params = OpenProtocolParams { handle, agent: services::image_handle(), controller: None };
    // SAFETY: nobody takes devices away while the loader runs: that is done by programs.
    unsafe { services::open_protocol(params, OpenProtocolAttributes::GetProtocol) }.ok()
}

fn framebuffer(mut screen: ScopedProtocol<GraphicsOutput>) -> Option<Framebuffer> {
    let now = mode(&screen.current_mode_info());
    if !now.is_good() {
        let best = screen.modes().max_by_key(|candidate| mode(candidate.info()).rank());
        if let Some(best) = best
            && mode(best.info()).rank() > now.rank()
        {
            // If this fails, the mode of before will do.
            let _ = screen.set_mode(&best);
        }
    }
    let info = mode(&screen.current_mode_info()).info()?;
    let start = screen.frame_buffer().as_mut_ptr().addr() as u64;
    let start = PhysAddr::try_new(start).ok().filter(|start| !start.is_null())?;
    Some(Framebuffer { start, info })
}

fn mode(info: &ModeInfo) -> Mode {
    let (width, height) = info.resolution();
    let layout = match info.pixel_format() {
        PixelFormat::Rgb => Layout::Rgb,
        PixelFormat::Bgr => Layout::Bgr,
        PixelFormat::Bitmask => info.pixel_bitmask().map_or(Layout::None, |masks| {
            Layout::Masks([masks.red, masks.green, masks.blue, masks.reserved])
        }),
        PixelFormat::BltOnly => Layout::None,
    };
    Mode { width, height, stride: info.stride(), layout }
}

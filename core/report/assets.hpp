// What every page is made of, as the build found it: page.html, page.css, page.js and the plotting library.
#pragma once
#include <string_view>

namespace tessera::assets {

extern const std::string_view kPage, kStyle, kScript, kLibrary;

}  // namespace tessera::assets

// The report as one HTML page that loads nothing: data, style, page code and the plotting library are in it.
#pragma once
#include <string>

#include "report/tables.hpp"

namespace tessera {

// The data of the page, thinned to what a screen shows.
nlohmann::json page_data(const RunComparison& comparison);
// `refresh_s`: seconds after which a browser reads the page again; 0: never.
std::string to_html(const RunComparison& comparison, const std::string& title, int64_t refresh_s = 0);

}  // namespace tessera

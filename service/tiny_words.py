"""The words that the tiny model speaks: plain text, one list, no code.

Used by `tiny.py`, and by the benchmark that has engines choose among them. The order is part of the model: a
word's place is its token id.
"""

from typing import Final

_TEXT: Final = """
a about above across after again against air all almost along already also always am among an ancient anchor
and another any anyone apart arc are around arrive art as ask at autumn away back bag bake balance ball band
bank bare bark barn basket bay be beach beacon beam bear beautiful because become bed before began begin
behind bell belong below bench bend beneath beside best better between beyond big bird bit black blade
blanket blew block blow blue board boat body bold book born both bottle bow bowl box brave bread break
breath breeze brick bridge bright bring broad broken brook brother brown build burn busy but button buy by
cabin call calm came candle cannot captain car careful carry cart castle catch cause ceiling centre certain
chair chalk chance change channel chart cheerful child choose circle city clean clear clerk climb clock
close cloth cloud coal coast coat coin cold colour come common compass cook cool copper corner could count
course cousin cover coxswain craft crane crew cross crowd cry cup current curtain cut daily dance dark dawn
day deck deep deer depth desk did different dinner dish distant do dock door down draw dream dress drift
drink drive drop dry dusk dust each eager ear early earth east easy eat echo edge eight either empty end
engine enjoy enough enter equal even evening ever every exact eye face fair fall familiar family far farm
fast father feather feel felt fence ferry few field fill find fine finger finish fire first fish five flag
flame flat fleet float floor flow flower fly fog fold follow food foot for forest forget fork form forward
found four fox fresh friend from front frost fruit full further garden gate gather gave gentle get gift give
glad glass glow go goat gold gone good grain grand grass gravel great green grew grey ground group grow
guard guest guide gull half hall hammer hand happy harbour hard has hat have hay he head hear heart heat
heavy held help hen her here hidden high hill him his hold hollow home honest honey hope horn horse hot hour
house how hull hundred hurry ice idea if in inch inside into iron island it item its ivory jacket jar join
journey joy judge jump just keel keep kettle key kind king kitchen kite knee knew knife knock know ladder
lake lamp land lantern large last late laugh law lay lead leaf lean learn least leather leave left lemon
length less lesson let letter level lid life lift light like limb line lion list listen little live load
local log long look loose lost loud love low lucky machine made mail main make many map march mark market
mast master match may me meadow meal mean measure meet memory merry met metal middle might mile milk mill
mind mine minute mirror mist mix model moment month moon more morning moss most mother motion mountain mouth
move much music must my nail name narrow near neat neck need nest net never new next night nine no noble
noise none noon north not note nothing now number oak oar oat ocean of off offer often oil old on once one
only open or orange orchard order other our out oval over owl own pace page paid paint pair palace pan paper
parcel park part pass past path patient pause pay peace pear pearl pen people perhaps piano picture piece
pier pilot pine pink pipe place plain plan plant plate play please plenty plum pocket poem point pole pond
pony poor port post pot potato pour present press pretty price promise proud pull purple push put queen
question quick quiet quilt quite rabbit race rail rain raise ran rather reach read ready real red reed rest
return ribbon rice rich ride right ring ripe rise river road roast rock roof room root rope rose rough round
row rowing rudder rule run safe said sail sailor salt same sand sat saw say school sea season seat second
secret see seed seem seldom send sent serve set seven several shade shadow shallow shape share sharp she
sheep shelf shell shelter shine ship shirt shoe shop shore short should show side signal silent silver
simple since sing sister sit six size skill sky sleep slide slow small smile smoke smooth snow so soap soft
soil some song soon sound soup south space spark speak speed spell spend spoon spring square stable stair
stand star start stay steady steam steel steer step still stir stone stood stop store storm story straight
strange straw stream street strong such sudden sugar summer sun supper sure sweet swift swim table tail take
tale talk tall tea teach team tell ten tent than that the their them then there these they thick thin thing
think third this those though thought thousand thread three through throw thunder tide tie till timber time
tin to today together told tomorrow too took tool top touch toward tower town track trade trail train travel
tree trip true trust try tunnel turn twelve twenty two uncle under until up upon us use valley very view
village visit voice wagon wait walk wall want warm was wash watch water wave way we wear weather week weigh
well went were west wet what wheat wheel when where which while whisper white who whole why wide wild will
wind window wing winter wire wise wish with within without wolf woman wonder wood wool word work world worth
would write yard year yellow yes yesterday yet you young your
"""

WORDS: Final = tuple(_TEXT.split())
